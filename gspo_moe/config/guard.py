"""The section `guard`: between which figures a run is sound, and what happens to one that is not. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from gspo_moe.section import Section

# Which metric each of the section's bounds is of.
METRIC_OF = {
    "reward": "reward/mean",
    "entropy": "policy/entropy",
    "response_length": "response/length_mean",
    "clip_fraction": "clip_fraction/sequence",
    "skipped_updates": "optimizer/skipped_updates",
}


class Bounds(Section):
    """What a figure may be, the bounds themselves included; null for no bound."""

    low: float | None = None
    high: float | None = None

    @property
    def are_set(self) -> bool:
        return self.low is not None or self.high is not None


class GuardConfig(Section):
    """Bounds of metrics of a sound step; without any, nothing is guarded. See docs/faults.md.

    reward: of reward/mean. entropy: of policy/entropy. response_length: of response/length_mean.
    clip_fraction: of clip_fraction/sequence. skipped_updates: of optimizer/skipped_updates.
    patience: steps in a row in which one of them is out of its bounds (or not finite), after which `action` is taken.
    action: `stop` ends the run; `roll_back` goes back to the newest checkpoint from before the first of these steps,
        and on from there with the prompts that come next, at most `roll_backs` times, then it ends the run.
    lr_factor: of the learning rate, once for each time.
    """

    reward: Bounds = Bounds()
    entropy: Bounds = Bounds()
    response_length: Bounds = Bounds()
    clip_fraction: Bounds = Bounds()
    skipped_updates: Bounds = Bounds()
    patience: PositiveInt = 5
    action: Literal["stop", "roll_back"] = "stop"
    roll_backs: PositiveInt = 3
    lr_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @property
    def bounds(self) -> dict[str, Bounds]:
        """Those that are set, by name."""
        return {name: found for name in METRIC_OF if (found := getattr(self, name)).are_set}

    def faults(self) -> Iterator[str]:
        for name, found in self.bounds.items():
            if found.low is not None and found.high is not None and found.low >= found.high:
                yield (
                    f"guard.{name}.low={found.low:g} is not below guard.{name}.high={found.high:g}, so that hardly a "
                    "figure lies between; change one of them"
                )
