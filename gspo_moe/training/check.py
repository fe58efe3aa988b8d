"""`gspo-moe train --check`: what can fail before a start, and what the run would need, without starting it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

from gspo_moe.config.checks import check_files
from gspo_moe.config.continuing import check_continues
from gspo_moe.config.schema import Config
from gspo_moe.data.prompts import PromptSource
from gspo_moe.model.hf import check_export
from gspo_moe.observability.header import describe_layout, describe_model
from gspo_moe.planning.memory import Memory, estimate
from gspo_moe.platform import device
from gspo_moe.training.fitting import used_splits
from gspo_moe.training.preflight import preflight
from gspo_moe.training.session import Plan

PROMPTS_READ = 64
GIB = 2**30


def check_run(config: Config, world_size: int) -> list[tuple[str, str]]:
    """A label and a text each, for a run of `world_size` processes; leaves no file behind.

    Raises ConfigError and DataError for everything that would keep `gspo-moe train` from starting.
    """
    check_files(config)
    check_continues(config)
    if config.checkpoint.export_hf:
        check_export(config.run_path / "hf")
    with tempfile.TemporaryDirectory() as folder:  # for a tokenizer that is trained
        logging = config.logging.model_copy(update={"run_dir": folder})
        plan = preflight(config.model_copy(update={"logging": logging}), world_size)
    prompt_tokens, where = _prompt_tokens(plan)
    memory = estimate(config, plan.architecture, plan.layout, prompt_tokens)
    return [
        (
            "config",
            f"{config.run_path}, {config.schedule.steps} steps of {config.task.name}: ready to start",
        ),
        ("model", describe_model(config, plan.architecture)),
        ("layout", f"{describe_layout(plan.layout)} on {world_size} process{'es' if world_size > 1 else ''}"),
        ("prompts", f"{prompt_tokens} tokens, {where}"),
        *memory_rows(memory),
        *_device_row(memory),
    ]


def memory_rows(memory: Memory) -> list[tuple[str, str]]:
    """The estimate a rank, and its sum, where the larger of training and generation counts."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "reference": memory.reference,
        "rollout copy": memory.rollout_copy,
        "activations": memory.activations,
        "log-probs": memory.log_probs,
        "KV cache": memory.kv_cache,
        "logits": memory.logits,
    }
    rows = [(name, _shown(size)) for name, size in parts.items() if size]
    total = (
        f"{_shown(memory.peak)} a rank, estimated: {_shown(memory.persistent)} always, and "
        f"{_shown(memory.activations + memory.log_probs)} in training or {_shown(memory.kv_cache + memory.logits)} in "
        "generation"
    )
    return [*rows, ("memory", total)]


def _shown(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _device_row(memory: Memory) -> Iterable[tuple[str, str]]:
    room = device().total_memory_gib()
    if room:
        verdict = "fits" if memory.peak / GIB < room else "does not fit"
        yield "device", f"{room:.1f} GiB: the estimate {verdict}"


def _prompt_tokens(plan: Plan) -> tuple[int, str]:
    """How long a prompt may be, and how that is known."""
    limit = plan.config.rollout.max_prompt_tokens
    if limit is not None:
        return limit, "rollout.max_prompt_tokens"
    split = used_splits(plan.config, trains=True)[0]
    size = plan.task.prompts.size(split) or PROMPTS_READ
    prompts = PromptSource(plan.task.prompts, split).take(min(PROMPTS_READ, size))
    longest = max(len(plan.renderer.prompt(prompt)) for prompt in prompts)
    return longest, f"the longest of the first {len(prompts)}"
