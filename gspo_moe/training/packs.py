"""What training knows of one pack, and what it replays.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gspo_moe.parallel.context import ContextSplit
from gspo_moe.parallel.groups import Groups
from gspo_moe.routing.recorder import Recording
from gspo_moe.training.critic import Estimates
from gspo_moe.types import Microbatch


@dataclass(frozen=True)
class TrainingPack:
    """One pack of a mini-batch on this rank.

    split: which of its tokens this context rank has.
    old_log_probs_T, estimates (ppo's): of the old policy; reference_log_probs_T: of a KL penalty's reference, None
        without one. All three are None off the last stage.
    recording: routes of the old policy's pass, with scores; None where it was not recorded.
    replay_TLK: routes to be replayed, None without replay.
    """

    pack: Microbatch
    split: ContextSplit
    old_log_probs_T: torch.Tensor | None = None
    reference_log_probs_T: torch.Tensor | None = None
    recording: Recording | None = None
    replay_TLK: torch.Tensor | None = None
    estimates: Estimates | None = None

    @property
    def old_routes_TLK(self) -> torch.Tensor:
        """What old_log_probs_T were taken with: the replayed routes, or the router's own."""
        if self.replay_TLK is not None:
            return self.replay_TLK
        assert self.recording is not None, "neither recorded nor replayed"
        return self.recording.routes_TLK


def training_packs(
    packs: Sequence[Microbatch],
    groups: Groups,
    old_log_probs: Sequence[torch.Tensor] = (),
    reference_log_probs: Sequence[torch.Tensor] = (),
    recordings: Sequence[Recording] = (),
    replayed: Sequence[torch.Tensor] | None = None,
    estimates: Sequence[Estimates] = (),
) -> list[TrainingPack]:
    """One record a pack of lists by pack, each of them empty where this rank has nothing of the kind."""
    return [
        TrainingPack(
            pack,
            ContextSplit(pack.cu_seqlens, groups.context),
            old_log_probs[index] if old_log_probs else None,
            reference_log_probs[index] if reference_log_probs else None,
            recordings[index] if recordings else None,
            replayed[index] if replayed else None,
            estimates[index] if estimates else None,
        )
        for index, pack in enumerate(packs)
    ]


def recordings_of(packs: Sequence[TrainingPack]) -> list[Recording]:
    """The old policy's, of packs that all have or all lack one."""
    return [each.recording for each in packs if each.recording is not None]


def replay_of(packs: Sequence[TrainingPack]) -> list[torch.Tensor] | None:
    """Each pack's routes to be replayed, as `routing.replay` takes them."""
    return [each.replay_TLK for each in packs if each.replay_TLK is not None] or None
