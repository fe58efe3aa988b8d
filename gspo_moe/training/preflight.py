"""Settles a run before any process group starts: files, tokenizer, architecture, layout, bank."""

from __future__ import annotations

import os

from gspo_moe.config.checks import check_files, check_reference, check_vocabulary
from gspo_moe.config.continuing import check_continues
from gspo_moe.config.layout import check_layout
from gspo_moe.config.lease import hold
from gspo_moe.config.schema import Config
from gspo_moe.data.prompts import PromptSource
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import load_tokenizer
from gspo_moe.errors import ConfigError
from gspo_moe.evaluation.evaluate import check_held_out
from gspo_moe.model.hf import check_export
from gspo_moe.parallel.groups import world_size_from_environment
from gspo_moe.platform import choose_backends, megatron_version
from gspo_moe.rollout.bank import check_bank
from gspo_moe.rollout.embedded.numerics import check_numerics
from gspo_moe.rollout.engine import make_stop_ids
from gspo_moe.tasks.in_time import make_task_in_time
from gspo_moe.tasks.rewards import check_rewards
from gspo_moe.training.fitting import fitted, used_splits
from gspo_moe.training.session import Plan
from gspo_moe.types import Message, OrderedPrompts

TOKENIZER_TEXTS = 1000


def preflight(config: Config, world_size: int | None = None, *, trains: bool = True) -> Plan:
    """Raises ConfigError, in one message, for everything about the run that cannot work here.

    world_size: of a run that is planned, None for this one's.
    trains: prompts are needed of training too, not of evaluation alone.
    """
    check_files(config)
    task, splits = make_task_in_time(config.task, config.seed), used_splits(config, trains)

    def texts() -> list[str]:
        without = isinstance(task.prompts, OrderedPrompts) or task.prompts.size("sft") == 0
        split = splits[0] if config.stage == "rl" and without else "sft"
        count = min(TOKENIZER_TEXTS, task.prompts.size(split) or TOKENIZER_TEXTS)
        prompts = PromptSource(task.prompts, split).take(count)
        answers = [task.demonstration(prompt) for prompt in prompts] if config.stage == "sft" else []
        return [prompt.shown for prompt in prompts] + [_text_of(answer) for answer in answers]

    if config.rollout.max_staleness and not task.single_turn and trains:
        raise ConfigError(
            f"rollout.max_staleness={config.rollout.max_staleness} goes on with answers while training runs, and the "
            f"conversations of task.name={config.task.name} have several turns; set rollout.max_staleness=0"
        )
    check_held_out(config, task)
    for split in splits:
        if split == "eval" or (split == "train" and config.rollout.bank is None):
            check_rewards(task.rubric, task.prompts, split)
    tokenizer = load_tokenizer(config.tokenizer, config.model.folder, texts, config.run_path)
    (first,) = PromptSource(task.prompts, splits[0]).take(1)
    renderer = Renderer(tokenizer, config.chat)
    renderer.prompt(first)
    make_stop_ids(tokenizer, config.rollout.stop)
    architecture = config.model.architecture(tokenizer.vocab_size)
    check_vocabulary(tokenizer.vocab_size, architecture)
    check_reference(config, architecture)
    if "sft" in splits:
        task.demonstration(first)
    elif trains and config.rollout.bank is not None:
        check_bank(config, tokenizer.vocab_size)
    processes = world_size_from_environment() if world_size is None else world_size
    layout = check_layout(config, architecture, processes, megatron_version())
    check_numerics(config, choose_backends(dict(config.model.backend), config.model.dtype))
    plan = fitted(Plan(config, layout, architecture, renderer, task), splits)
    check_held_out(config, plan.task)
    return plan


def take_run_folder(config: Config, *, ends_together: bool) -> None:
    """The main process holds `logging.run_dir`, and sees that the run may go on there.

    ends_together: a launcher ends all processes with one that fails; without it each sees what it can for itself, lest
    the others wait for a main process that is gone. Raises ConfigError, DataError for an export that is not ours.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    if ends_together and not is_main:
        return
    check_files(config)
    if is_main:
        hold(config.run_path, "logging.run_dir")
    check_continues(config)
    if config.checkpoint.export_hf:
        check_export(config.run_path / "hf")


def _text_of(answer: str | tuple[Message, ...]) -> str:
    return answer if isinstance(answer, str) else "\n".join(message.content for message in answer)
