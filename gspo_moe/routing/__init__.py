"""Routing measurements. This file imports no recorder, so that the figures work without megatron-core."""

from gspo_moe.routing.volatility import RouteSums, overlap_TL, volatility

__all__ = ["RouteSums", "overlap_TL", "volatility"]
