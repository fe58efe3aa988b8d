"""Figures and pages from what observability reads."""
