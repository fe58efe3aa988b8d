"""Keeps some rollouts with their rewards in samples.jsonl, so that a person can read what the model writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gspo_moe.observability.jsonl import JsonLines
from gspo_moe.types import Finish, Prompt, Rollout

FILE = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One rollout as a person reads it.

    prompt, response: all that was read and said, as text. messages: `{"role", "content"}` of a prompt that is a chat.
    turns: `{"role", "text"}` of what followed the prompt. finished: False where a limit cut it off (see `finish`).
    reward_parts: the rubric's named parts. reward_error: why the reward is `task.reward.failure_reward`, else None.
    Reward, parts and advantage must be finite.
    """

    step: int
    uid: str
    prompt: str
    response: str
    reward: float
    advantage: float
    finished: bool
    finish: Finish | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    turns: tuple[Mapping[str, str], ...] = ()
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    reward_error: str | None = None

    @classmethod
    def of(cls, step: int, prompt: Prompt, rollout: Rollout, advantage: float) -> Sample:
        """Of a rollout that has its reward."""
        assert rollout.reward is not None, "no rubric has seen this rollout"
        return cls(
            step=step,
            uid=prompt.uid,
            prompt=prompt.shown,
            response=rollout.text,
            reward=rollout.reward.total,
            advantage=advantage,
            finished=rollout.finish == "stop",
            finish=rollout.finish,
            messages=tuple({"role": one.role, "content": one.content} for one in prompt.messages),
            turns=tuple({"role": turn.role, "text": turn.text} for turn in rollout.turns),
            reward_parts=dict(rollout.reward.parts),
            reward_error=rollout.reward.error,
        )

    @property
    def record(self) -> dict[str, Any]:
        """Its line in the file: what is empty is left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, (), {})}


class SampleWriter:
    """Appends to `run_dir`/samples.jsonl; `resume_step` as in `JsonLines`."""

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        self._lines = JsonLines(Path(run_dir) / FILE, resume_step)

    def write(self, sample: Sample) -> None:
        self._lines.append(sample.record)

    def flush(self) -> None:
        """Raises OSError where the file does not take them."""
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()
