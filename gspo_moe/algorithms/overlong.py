"""The soft over-long punishment of arXiv 2503.14476. Shape letters: N rollouts."""

from __future__ import annotations

import torch


def overlong_penalty(lengths: torch.Tensor, max_response_tokens: int, buffer: int) -> torch.Tensor:
    """What is added to the rewards of responses of these lengths, equation 13.

    0 up to max_response_tokens - buffer tokens, from there a straight line to -1 at max_response_tokens, where
    generation ends. lengths: integers [N]; buffer: L_cache, at least 1. Returns float64 [N].
    """
    assert 0 < buffer <= max_response_tokens
    return ((max_response_tokens - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)
