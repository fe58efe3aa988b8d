"""Figures and pages from what observability reads."""

from gspo_moe.report.curves import draw_curves

__all__ = ["draw_curves"]
