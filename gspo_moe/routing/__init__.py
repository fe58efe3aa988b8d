"""Routing measurements. This file imports no recorder, so that the figures work without megatron-core."""

from gspo_moe.routing.load import LoadSums, expert_load
from gspo_moe.routing.volatility import PairSums, RouteSums, overlap_TL, volatility

__all__ = ["LoadSums", "PairSums", "RouteSums", "expert_load", "overlap_TL", "volatility"]
