"""What a run's policy reads, what ends its answers and what rewards them, for a person to check before it trains."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence

from gspo_moe.config.backend import BackendConfig
from gspo_moe.config.schema import Config
from gspo_moe.config.task import EnvironmentConfig, RewardConfig
from gspo_moe.config.training import ParallelConfig
from gspo_moe.data.prompts import PromptSource
from gspo_moe.rollout.engine import make_stop_ids
from gspo_moe.tasks.protocol import Task
from gspo_moe.training.fitting import used_splits
from gspo_moe.training.preflight import preflight
from gspo_moe.training.session import Plan

MOST_CHARACTERS = 4000  # of a prompt


def describe(config: Config) -> str:
    """The config's task, template, reward, stops and first prompt, without starting anything. Raises as `preflight`.

    The layout is not checked: this machine need not be the one that the config is for.
    """
    with tempfile.TemporaryDirectory() as folder:  # for a tokenizer that is trained on the task's text
        here = {
            "parallel": ParallelConfig(),
            "model": config.model.model_copy(update={"backend": BackendConfig()}),
            "logging": config.logging.model_copy(update={"run_dir": folder}),
        }
        data = config.task.data
        trains = data is None or bool(data.train or data.sft)  # else it is for `gspo-moe eval`
        plan = preflight(config.model_copy(update=here), trains=trains)
    stop = config.rollout.stop
    alone = [text for text in stop if len(plan.tokenizer.encode(text)) == 1]
    sizes = {split: plan.task.prompts.size(split) for split in ("train", "sft", "eval")}
    rows = [
        ("task", plan.task.name + _bracketed(f"{split} {_size(size)}" for split, size in sizes.items())),
        ("tokenizer", f"{type(plan.tokenizer).__name__}, {plan.tokenizer.vocab_size:,} tokens"),
        ("chat template", _template(plan)),
        ("chat settings", _settings(config)),
        ("stop tokens", _tokens(plan, sorted(make_stop_ids(plan.tokenizer, stop)))),
        ("stop strings", ", ".join(repr(text) for text in stop if text not in alone) or "none of several tokens"),
        ("reward", _reward(config.task.reward, plan.task)),
        ("environment", _environment(config.task.environment, plan.task)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", show_prompt(plan, trains=trains)])


def show_prompt(plan: Plan, *, trains: bool = True) -> str:
    """The run's first prompt as its policy reads it, with its length, and what does not fit together there.

    trains: as `preflight` has it.
    """
    (prompt,) = PromptSource(plan.task.prompts, used_splits(plan.config, trains)[0]).take(1)
    text, count = plan.renderer.text(prompt), len(plan.renderer.prompt(prompt))
    cut = len(text) - MOST_CHARACTERS
    if cut > 0:
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]}\n... {cut:,} characters more ...\n{text[-half:]}"
    lines = [f"prompt {prompt.uid} as the model reads it, {count:,} tokens, chat template: {_template(plan)}"]
    lines += [f"| {line}" for line in text.split("\n")]
    end = plan.renderer.end_of_answer(prompt)
    if end is not None and end not in make_stop_ids(plan.tokenizer, plan.config.rollout.stop):
        lines.append(
            f"warning: the chat template ends an answer with {plan.tokenizer.decode([end])!r}, at which no rollout "
            "stops; add it to rollout.stop"
        )
    return "\n".join(lines)


def _template(plan: Plan) -> str:
    template = plan.renderer.template
    if template is not None:
        return f"{template.file} (chat.template={plan.config.chat.template})"
    why = "chat.template=none" if plan.config.chat.template == "none" else "the tokenizer has none"
    return f"none, {why}: text goes in as it is"


def _settings(config: Config) -> str:
    chat = config.chat
    found = {"system": chat.system, "thinking": chat.thinking, **chat.variables}
    given = [f"{name}={value!r}" for name, value in found.items() if value is not None]
    return ", ".join([*given, f"words of special tokens in prompts are {chat.special_tokens}"])


def _tokens(plan: Plan, ids: Sequence[int]) -> str:
    texts = {one: plan.tokenizer.decode([one]) for one in ids}
    return ", ".join(f"{one} {text!r}" if text else f"{one}, which has no text" for one, text in texts.items())


def _reward(config: RewardConfig, task: Task) -> str:
    if config.sum:
        return " + ".join(f"{term.weight:g} {term.name}{_options(term.options)}" for term in config.sum)
    if config.name is not None:
        return config.name + _options(config.options)
    return f"the task's own, {type(task.rubric).__name__}"


def _environment(config: EnvironmentConfig, task: Task) -> str:
    if task.single_turn:
        return "none: one answer a prompt"
    if config.name is not None:
        return config.name + _options(config.options)
    return f"the task's own, {type(task.environment).__name__}"


def _options(options: dict[str, object]) -> str:
    return _bracketed(f"{name}={value!r}" for name, value in options.items())


def _bracketed(parts: Iterable[str]) -> str:
    joined = ", ".join(parts)
    return f" ({joined})" if joined else ""


def _size(size: int | None) -> str:
    return "without end" if size is None else f"{size:,}"
