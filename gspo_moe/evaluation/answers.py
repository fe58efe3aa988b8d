"""The answers of an evaluation as a file: JSON, a line a prompt, in the order of the prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gspo_moe.config.outputs import output_fault
from gspo_moe.errors import ConfigError
from gspo_moe.evaluation.estimates import correct_answers
from gspo_moe.files import write_whole
from gspo_moe.types import Rollout, RolloutGroup


def check_answers_file(path: Path, *, overwrite: bool) -> None:
    """Raises ConfigError, naming --output, where the file cannot be written, or is there and is not to be replaced."""
    fault = output_fault(path)
    if fault is not None:
        raise ConfigError(f"--output {fault}")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists; name another file, or replace it with --overwrite")


def write_answers(path: Path, groups: Sequence[RolloutGroup]) -> None:
    """Writes the file whole, with folders that are missing; replaces one that is there."""
    lines = (json.dumps(answers_record(group), ensure_ascii=False, allow_nan=False) + "\n" for group in groups)
    # A lone surrogate, which a reward's error may hold, is written as JSON's own escape.
    write_whole(path, "".join(lines).encode(errors="backslashreplace"))


def answers_record(group: RolloutGroup) -> dict[str, Any]:
    """One line: the prompt as it was given, what its reward compares with, and every answer."""
    prompt = group.prompt
    return {
        "uid": prompt.uid,
        "task": prompt.task,
        "prompt": prompt.shown,
        **({"messages": [asdict(message) for message in prompt.messages]} if prompt.messages else {}),
        **({"reference": prompt.reference} if prompt.reference else {}),
        "correct": correct_answers(group),
        "answers": [_answer(rollout) for rollout in group.rollouts],
    }


def _answer(rollout: Rollout) -> dict[str, Any]:
    """tokens: that the policy sampled, end tokens included."""
    reward = rollout.reward
    assert reward is not None, "no rubric has seen this rollout"
    return {
        "text": rollout.text,
        **({"turns": [asdict(turn) for turn in rollout.turns]} if len(rollout.turns) > 1 else {}),
        "reward": reward.total,
        **({"parts": dict(reward.parts)} if reward.parts else {}),
        **({"error": reward.error} if reward.error is not None else {}),
        "finish": rollout.finish,
        "tokens": len(rollout.log_probs),
    }
