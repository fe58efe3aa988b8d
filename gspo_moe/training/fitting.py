"""Looks at every prompt that a run can take before it starts: whether it is too long, and what is then done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gspo_moe.config.schema import Config
from gspo_moe.data.long_prompts import KeptPrompts, ShortPrompts, lengths, prompt_limit, too_long
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.training.session import Plan
from gspo_moe.training.sft import training_sample
from gspo_moe.types import OrderedPrompts, Prompt, Prompts


@dataclass(frozen=True)
class Check:
    """bound: tokens that `measure` may find. words: what sets it. fix: what else one can do. cuts: at the left end."""

    split: str
    bound: int
    words: str
    fix: str
    measure: Callable[[Sequence[Prompt]], Iterator[int]]
    cuts: bool


def used_splits(config: Config, trains: bool) -> tuple[str, ...]:
    """Those that a run takes prompts from; trains: it does more than evaluate."""
    trained = (("sft",) if config.stage == "sft" else ("train",)) if trains else ()
    return (*trained, *(("eval",) if config.evaluation.prompts or not trains else ()))


def fitted(plan: Plan, splits: Sequence[str]) -> Plan:
    """The plan with prompts of `splits` that all have room, as `rollout.long_prompts` wants; says what it left out.

    Raises DataError for too long ones that are to be an error, and where none is left; ConfigError where the limits
    leave no room at all, and for a prompt without the demonstration that stage sft needs.
    """
    config, prompts, whole = plan.config, plan.task.prompts, plan
    mode, positions = config.rollout.long_prompts, plan.architecture.max_positions
    if mode == "truncate_left":
        limits = [prompt_limit(config, positions, split).tokens for split in splits]
        if min(limits) < limits[0]:  # training would learn from other prompts where evaluation changes
            raise ConfigError(
                f"rollout.long_prompts=truncate_left cuts all prompts to {limits[0]} tokens, and "
                f"evaluation.max_response_tokens={config.evaluation.max_response_tokens} leaves {min(limits)}; "
                f"set rollout.max_prompt_tokens={min(limits)}"
            )
        plan = replace(plan, renderer=replace(plan.renderer, max_prompt_tokens=limits[0]))
    for split in splits:
        size = prompts.size(split)
        if size is not None:
            check = _of_demonstrations(plan) if split == "sft" else _of_prompts(whole, split)
            prompts = _checked(check, prompts, size, mode)
    endless = [split for split in splits if prompts.size(split) is None]
    if endless and (mode == "drop" or (mode == "error" and config.rollout.max_prompt_tokens is not None)):
        limit = prompt_limit(config, positions)
        prompts = ShortPrompts(prompts, endless, plan.renderer, limit, drops=mode == "drop")
    return plan if prompts is plan.task.prompts else replace(plan, task=replace(plan.task, prompts=prompts))


def _of_prompts(plan: Plan, split: str) -> Check:
    limit = prompt_limit(plan.config, plan.architecture.max_positions, split)
    return Check(
        split=split,
        bound=limit.tokens,
        words=limit.words,
        fix="raise that, or set rollout.long_prompts to drop or truncate_left",
        measure=lambda prompts: lengths(plan.renderer, prompts, limit.tokens),
        cuts=True,
    )


def _of_demonstrations(plan: Plan) -> Check:
    """Of all of a sequence, as its pack has it; where the prompt alone is too long by its own limit, that is said."""
    config, positions = plan.config, plan.architecture.max_positions
    own, budget = config.rollout.max_prompt_tokens, config.schedule.micro_batch_tokens
    bound = min(budget, positions)

    def measure(prompts: Sequence[Prompt]) -> Iterator[int]:
        for prompt in prompts:
            sample = training_sample(plan.renderer, prompt, plan.task.demonstration(prompt))
            before = sample.response_mask.index(1)
            yield bound + before if own is not None and before > own else len(sample.token_ids) - 1

    name = f"schedule.micro_batch_tokens={budget}" if bound == budget else f"the model's {positions} positions"
    return Check(
        split="sft",
        bound=bound,
        words=f"{name} with their demonstrations"
        + ("" if own is None else f", or than rollout.max_prompt_tokens={own} without"),
        fix="raise that, or set rollout.long_prompts=drop",
        measure=measure,
        cuts=False,
    )


def _checked(check: Check, prompts: Prompts, size: int, mode: str) -> Prompts:
    """The prompts without those that are too long, where these may be left out."""
    split = check.split
    if isinstance(prompts, OrderedPrompts) and prompts.skipped(split):
        skipped = prompts.skipped(split)
        _say(f"{len(skipped)} records of split {split!r} cannot be read and are left out, the first: {skipped[0]}")
    found = too_long(prompts, split, size, check.measure, check.bound)
    if not found:
        return prompts
    first = min(found)
    place = prompts.where(split, first) if isinstance(prompts, OrderedPrompts) else f"prompt {split}/{first}"
    fault = f"{len(found)} of {size} prompts of split {split!r} are longer than {check.words}"
    if mode == "error" or (mode == "truncate_left" and not check.cuts):
        raise DataError(f"{fault}, the first is {place} with {found[first]} tokens; {check.fix}")
    if mode == "drop" and len(found) == size:
        raise DataError(f"{fault}, so that none is left; raise that")
    did = "left out" if mode == "drop" else "cut off at their left end"
    _say(f"{fault} and are {did}, the first is {place} with {found[first]} tokens")
    if mode != "drop":
        return prompts
    kept = [index for index in range(size) if index not in found]
    return prompts.kept(split, kept) if isinstance(prompts, OrderedPrompts) else KeptPrompts(prompts, split, kept)


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)
