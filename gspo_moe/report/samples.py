"""Sample rollouts as conversations, cut to what a page can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gspo_moe.report.collect import Arm

STEPS_SHOWN = 25
SAMPLES_A_STEP = 6
CHARACTERS_SHOWN = 6000
SHORTENED = " … (cut)"


def sample_rollouts(arm: Arm) -> list[dict[str, Any]]:
    """Rollouts of the first seed that has any, at up to STEPS_SHOWN steps spread over the run; long texts are cut."""
    cell = next((cell for cell in arm.cells if cell.samples), None)
    if cell is None:
        return []
    steps = sorted({sample["step"] for sample in cell.samples})
    chosen = {steps[i] for i in np.linspace(0, len(steps) - 1, min(len(steps), STEPS_SHOWN)).round().astype(int)}
    shown: list[dict[str, Any]] = []
    for step in sorted(chosen):
        rollouts = [sample for sample in cell.samples if sample["step"] == step]
        shown += [_readable(sample, cell.seed) for sample in rollouts[:SAMPLES_A_STEP]]
    return shown


def _readable(sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One rollout for the page; files of versions without turns have prompt and response alone."""
    parts = sample.get("reward_parts")
    return {
        "step": sample["step"],
        "seed": seed,
        "uid": str(sample.get("uid", "")),
        "said": [{"role": role, "text": _cut(text)} for role, text in _said(sample)],
        "reward": sample.get("reward"),
        "parts": parts if isinstance(parts, dict) else {},
        "advantage": sample.get("advantage"),
        "end": _end(sample),
        "error": _cut(str(sample.get("reward_error") or "")),
    }


def _said(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(who, what) in order: the prompt or its messages, then the turns or the response."""
    messages, turns = sample.get("messages") or (), sample.get("turns") or ()
    before = [(str(one.get("role")), str(one.get("content"))) for one in messages] or [
        ("prompt", str(sample.get("prompt", "")))
    ]
    behind = [(str(one.get("role")), str(one.get("text"))) for one in turns]
    return [*before, *(behind or [("policy", str(sample.get("response", "")))])]


def _end(sample: Mapping[str, Any]) -> str:
    """Why it ended, in words; empty where the policy ended it itself."""
    words = {"length": "cut off by the length limit", "error": "its environment failed", "abandoned": "abandoned"}
    return words.get(str(sample.get("finish")), "") or (
        words["length"] if sample.get("finished") is False and sample.get("finish") is None else ""
    )


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + SHORTENED
