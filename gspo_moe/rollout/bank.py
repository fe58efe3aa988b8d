"""Rollouts of one policy with their rewards, frozen in one file, so that several runs learn from the very same ones.

A safetensors file. Tensors, rollouts end to end in the order of the groups:
  token_ids int32 [sum of tokens], prompt and response; prompt_lengths, response_lengths int32 [R];
  log_probs float64 [sum of response tokens], as `types.Rollout`; rewards float64 [R];
  routes uint8 or int16 [sum of (tokens - 1), MoE layers, K], only where the engine reported them.
Metadata: `format`, `bank` (JSON: groups' prompts and sizes, rollouts' texts and the like, sampling).

Shape letters: R rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gspo_moe.errors import DataError, RolloutError
from gspo_moe.files import write_whole
from gspo_moe.rollout.answers import Answers, ScoredGroup
from gspo_moe.tasks.rewards import LARGEST_REWARD
from gspo_moe.types import Prompt, Rollout, RolloutGroup

FORMAT = "gspo_moe bank 1"
# What must be the same where a bank is made and where it is used, keys of the config's `rollout`.
SAMPLING = ("samples_per_prompt", "temperature", "top_p", "top_k", "max_response_tokens")
KEPT = ("uid", "sample_index", "finished", "policy_version", "text")


@dataclass(frozen=True)
class Bank:
    """groups: one a prompt. sampling: `SAMPLING` and vocab_size that they were made with."""

    groups: tuple[ScoredGroup, ...]
    sampling: dict[str, Any]

    @cached_property
    def _by_uid(self) -> dict[str, ScoredGroup]:
        return {group.group.prompt.uid: group for group in self.groups}

    def answers(self, prompts: Sequence[Prompt]) -> Answers:
        """The frozen answers to these prompts; raises RolloutError where it has none or they answer another text."""
        found = []
        for prompt in prompts:
            group = self._by_uid.get(prompt.uid)
            if group is None or group.group.prompt != prompt:
                raise RolloutError(
                    f"the bank of {len(self.groups)} prompts has no answers to {prompt.uid}, {prompt.text!r}; make one "
                    "with `gspo-moe bank` from this config, its seed, task and schedule.steps"
                )
            found.append(group)
        return Answers(tuple(found), failures=0, timeouts=0, first_error=None)


def write_bank(path: Path, bank: Bank) -> None:
    """Writes the file at once, so that nobody reads half of it."""
    rollouts = [rollout for scored in bank.groups for rollout in scored.group.rollouts]
    tensors = {
        "token_ids": torch.tensor([t for r in rollouts for t in (*r.prompt_ids, *r.response_ids)], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in rollouts], dtype=torch.int32),
        "response_lengths": torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.int32),
        "log_probs": torch.tensor([p for r in rollouts for p in r.log_probs], dtype=torch.float64),
        "rewards": torch.tensor([reward for scored in bank.groups for reward in scored.rewards], dtype=torch.float64),
    }
    routes = [rollout.routes for rollout in rollouts if rollout.routes is not None]
    if routes:
        assert len(routes) == len(rollouts)
        tensors["routes"] = torch.cat(routes).cpu()
    described = {
        "sampling": bank.sampling,
        "has_routes": bool(routes),
        "groups": [{"prompt": asdict(g.group.prompt), "size": len(g.group.rollouts)} for g in bank.groups],
        "rollouts": [{key: getattr(rollout, key) for key in KEPT} for rollout in rollouts],
    }
    metadata = {"format": FORMAT, "bank": json.dumps(described)}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def describe_bank(path: str | Path) -> dict[str, Any]:
    """Sampling, groups and rollouts as plain values, without the tensors; raises DataError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a bank ({error}); make one with `gspo-moe bank`") from error
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is no bank of this version ({FORMAT}); make one with `gspo-moe bank`")
    found: dict[str, Any] = json.loads(metadata["bank"])
    return found


def read_bank(path: str | Path) -> Bank:
    """Reads what `write_bank` wrote; DataError for other files, ids that no token has, rewards too large."""
    described = describe_bank(path)
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    largest, vocab_size = int(tensors["token_ids"].max()), described["sampling"]["vocab_size"]
    if largest >= vocab_size:
        raise DataError(
            f"{path} holds token {largest}, which its tokenizer of {vocab_size} tokens does not have and no policy can "
            "sample; make another one with `gspo-moe bank`"
        )
    reward = float(tensors["rewards"].abs().max())
    if not reward <= LARGEST_REWARD:
        raise DataError(
            f"{path} holds a reward of size {reward:g}, beyond {LARGEST_REWARD:g}, where advantages lose their "
            "precision; make another one with `gspo-moe bank`"
        )
    rollouts = _rollouts(tensors, described["rollouts"])
    rewards = iter(tensors["rewards"].tolist())
    groups = []
    for group in described["groups"]:
        members = tuple(next(rollouts) for _ in range(group["size"]))
        scored = RolloutGroup(Prompt(**group["prompt"]), members)
        groups.append(ScoredGroup(scored, tuple(next(rewards) for _ in members)))
    return Bank(tuple(groups), described["sampling"])


def _rollouts(tensors: dict[str, torch.Tensor], described: Sequence[dict[str, Any]]) -> Iterator[Rollout]:
    prompts, responses = tensors["prompt_lengths"].tolist(), tensors["response_lengths"].tolist()
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    tokens = tensors["token_ids"].split(lengths)
    log_probs = tensors["log_probs"].split(responses)
    routes: Sequence[torch.Tensor | None] = [None] * len(lengths)
    if "routes" in tensors:
        routes = tensors["routes"].split([length - 1 for length in lengths])
    for number, fields in enumerate(described):
        ids = tokens[number].tolist()
        yield Rollout(
            prompt_ids=tuple(ids[: prompts[number]]),
            response_ids=tuple(ids[prompts[number] :]),
            log_probs=tuple(log_probs[number].tolist()),
            routes=routes[number],
            **fields,
        )
