"""GSPO and its kin as pure functions: tensors in, loss and mergeable statistics out.

A name's module is imported when it is asked for: the configuration asks for specifications and does without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_moe.algorithms.advantages import degenerate_groups, group_advantages
    from gspo_moe.algorithms.kl import KLPenalty
    from gspo_moe.algorithms.loss import Counts, Extras, PolicyLoss, PolicyStatistics, Settings, policy_loss
    from gspo_moe.algorithms.ratios import LossInputs, Objective, Segments, clip
    from gspo_moe.algorithms.rollout_mismatch import (
        Correction,
        CorrectionStatistics,
        MismatchStatistics,
        correct,
        mismatch,
    )
    from gspo_moe.algorithms.spec import Algorithm, ValueOptions
    from gspo_moe.algorithms.statistics import Statistics
    from gspo_moe.algorithms.table import algorithm_names, find_algorithm

MODULES = ("spec", "table", "statistics", "advantages", "kl", "ratios", "rollout_mismatch", "loss")

__all__ = [
    "Algorithm",
    "Correction",
    "CorrectionStatistics",
    "Counts",
    "Extras",
    "KLPenalty",
    "LossInputs",
    "MismatchStatistics",
    "Objective",
    "PolicyLoss",
    "PolicyStatistics",
    "Segments",
    "Settings",
    "Statistics",
    "ValueOptions",
    "algorithm_names",
    "clip",
    "correct",
    "degenerate_groups",
    "find_algorithm",
    "group_advantages",
    "mismatch",
    "policy_loss",
]


def __getattr__(name: str) -> Any:
    for module in MODULES if name in __all__ else ():
        found = vars(importlib.import_module(f"gspo_moe.algorithms.{module}"))
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
