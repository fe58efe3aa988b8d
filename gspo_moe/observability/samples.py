"""Keeps some rollouts with their rewards in samples.jsonl, so that a person can read what the model writes."""

from __future__ import annotations

from pathlib import Path

from gspo_moe.observability.jsonl import JsonLines


class SampleWriter:
    """Appends to `run_dir`/samples.jsonl; `resume_step` as in `JsonLines`."""

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        self._lines = JsonLines(Path(run_dir) / "samples.jsonl", resume_step)

    def write(
        self, *, step: int, uid: str, prompt: str, response: str, reward: float, advantage: float, finished: bool
    ) -> None:
        """One rollout; `finished` is False when the length limit cut it off. Reward and advantage must be finite."""
        self._lines.append(
            {
                "step": step,
                "uid": uid,
                "prompt": prompt,
                "response": response,
                "reward": reward,
                "advantage": advantage,
                "finished": finished,
            }
        )

    def close(self) -> None:
        self._lines.close()
