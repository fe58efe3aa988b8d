"""The matrix of parallel layouts that `check_layouts.py` holds against one process, and those that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A layout a line: processes, keys of the config's `parallel` part, and with a dot in them overrides of other parts.
LAYOUTS = Path(__file__).with_name("layouts.txt")
TIED = "model.overrides.tie_word_embeddings=true"
WITHOUT_EXPERT_TENSOR = "expert_tensor=1 expert=1"
WITHOUT_OVERLAP = "overlap_p2p_comm=False"


@dataclass(frozen=True)
class Case:
    """One layout: processes, the config's `parallel` keys, and other overrides.

    wrong: what is set past our refusal, to show what megatron-core would then compute.
    """

    world: int
    parallel: dict[str, Any]
    more: tuple[str, ...] = ()
    wrong: str = ""

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in self.parallel.items()] + [*self.more, self.wrong]
        return f"{self.world}: " + (" ".join(filter(None, parts)) or "plain")

    @property
    def reference(self) -> str:
        """The run of one process with the same weights: tied embeddings are another model."""
        return Case(1, {}, tuple(text for text in self.more if text == TIED)).name


def cases() -> list[Case]:
    """The matrix: a line of LAYOUTS each. The first is the reference of all but those with tied embeddings."""
    found = []
    for line in LAYOUTS.read_text().splitlines():
        world, *settings = line.split()
        parallel = dict(setting.split("=") for setting in settings if "." not in setting)
        found.append(Case(int(world), parallel, tuple(setting for setting in settings if "." in setting)))
    return found


def refused() -> list[Case]:
    """What config/layout.py refuses, or no config can ask for, because megatron-core 0.16.1 gets it wrong silently."""
    return [
        Case(2, {"tensor": 2}, wrong=WITHOUT_EXPERT_TENSOR),
        # With packs of different lengths this one crashes; equally long ones get each other's gradients.
        Case(
            2,
            {"pipeline": 2, "virtual_pipeline": 2, "dispatcher": "allgather"},
            ("schedule.micro_batch_tokens=48",),
            wrong=WITHOUT_OVERLAP,
        ),
    ]
