"""Picks tokens from logits: pure maths, reproducible from (seed, prompt, sample) whatever shares the batch.

Shape letters: N sequences, V the whole vocabulary, R response tokens at most.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def uniforms(keys: list[str], length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [N, R]: row n depends on keys[n] alone (counter-based Philox)."""
    rows = np.empty((len(keys), length))
    for row, key in zip(rows, keys, strict=True):
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        row[:] = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))).random(length)
    return torch.from_numpy(rows)


def sample(
    logits_NV: torch.Tensor, uniforms_N: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N] (int64) and their log-probs [N] (fp32, nats) under softmax(logits / temperature), untruncated.

    top_k keeps the k likeliest tokens (0 keeps all); top_p then keeps the fewest likeliest whose probabilities reach
    top_p. Temperature 0 takes the likeliest token and reports log-probs at temperature 1.
    """
    greedy = temperature == 0.0
    log_probs_NV = torch.log_softmax(logits_NV.float() / (1.0 if greedy else temperature), dim=-1)
    if greedy:
        tokens_N = log_probs_NV.argmax(dim=-1)
    else:
        tokens_N = _invert_cdf(_truncate(log_probs_NV.double().exp(), top_p, top_k), uniforms_N)
    return tokens_N, log_probs_NV.gather(1, tokens_N[:, None])[:, 0]


def _truncate(probs_NV: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    if 0 < top_k < probs_NV.shape[1]:
        kept = torch.zeros_like(probs_NV).scatter_(1, probs_NV.topk(top_k, dim=1).indices, 1.0)
        probs_NV = probs_NV * kept
        probs_NV = probs_NV / probs_NV.sum(dim=1, keepdim=True)
    if top_p < 1.0:
        ordered, index = probs_NV.sort(dim=1, descending=True)
        before = ordered.cumsum(dim=1) - ordered
        probs_NV = torch.zeros_like(probs_NV).scatter_(1, index, ordered * (before < top_p))
    return probs_NV


def _invert_cdf(probs_NV: torch.Tensor, uniforms_N: torch.Tensor) -> torch.Tensor:
    cdf_NV = probs_NV.cumsum(dim=1)
    threshold_N1 = uniforms_N[:, None].to(cdf_NV.device) * cdf_NV[:, -1:]
    return torch.searchsorted(cdf_NV, threshold_N1, right=True)[:, 0].clamp_max(probs_NV.shape[1] - 1)
