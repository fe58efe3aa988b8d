"""GSPO and its kin as pure functions: tensors in, loss and mergeable statistics out."""

from gspo_moe.algorithms.advantages import degenerate_groups, group_advantages
from gspo_moe.algorithms.kl import KLPenalty
from gspo_moe.algorithms.loss import PolicyLoss, PolicyStatistics, policy_loss
from gspo_moe.algorithms.mismatch import Correction, CorrectionStatistics, MismatchStatistics, correct, mismatch
from gspo_moe.algorithms.statistics import Statistics

__all__ = [
    "Correction",
    "CorrectionStatistics",
    "KLPenalty",
    "MismatchStatistics",
    "PolicyLoss",
    "PolicyStatistics",
    "Statistics",
    "correct",
    "degenerate_groups",
    "group_advantages",
    "mismatch",
    "policy_loss",
]
