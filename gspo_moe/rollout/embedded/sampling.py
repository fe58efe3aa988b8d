"""Picks tokens from logits: pure maths, reproducible from (seed, prompt, sample) whatever shares the batch.

Shape letters: N sequences, V the whole vocabulary, R response tokens at most, B blocks of C tokens, X tokens or blocks.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

BLOCK = 256
BELOW_ONE = 1.0 - 2.0**-53


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

    A token is the first whose cumulative probability, in the order of the vocabulary, exceeds the uniform number.
    top_k keeps the k likeliest tokens (0 keeps all); top_p then keeps the fewest likeliest whose probabilities reach
    top_p. Temperature 0 takes the likeliest token and reports log-probs at temperature 1.
    """
    greedy = temperature == 0.0
    scaled_NV = logits_NV.float() if greedy or temperature == 1.0 else logits_NV.float() / temperature
    below_NV = scaled_NV - scaled_NV.amax(dim=-1, keepdim=True)
    blocks_NBC = _blocks(below_NV)
    sums_NB = blocks_NBC.sum(dim=2).double()
    if greedy:
        tokens_N = below_NV.argmax(dim=-1)
    elif top_k or top_p < 1.0:
        tokens_N = _from_likeliest(below_NV, sums_NB.sum(dim=1, keepdim=True), uniforms_N, top_p, top_k)
    else:
        # Among NaN it may find a place behind the vocabulary's end.
        tokens_N = _from_all(blocks_NBC, sums_NB, uniforms_N).clamp_max(logits_NV.shape[1] - 1)
    log_sum_N = sums_NB.sum(dim=1).log()
    return tokens_N, (below_NV.gather(1, tokens_N[:, None])[:, 0] - log_sum_N).float()


def _blocks(below_NV: torch.Tensor) -> torch.Tensor:
    """exp of the values, in blocks of C of the vocabulary, zeros behind its end."""
    count, vocab = below_NV.shape
    blocks_NX = below_NV.new_empty(count, vocab + -vocab % BLOCK)
    blocks_NX[:, vocab:].zero_()
    torch.exp(below_NV, out=blocks_NX[:, :vocab])
    return blocks_NX.view(count, -1, BLOCK)


def _from_all(blocks_NBC: torch.Tensor, sums_NB: torch.Tensor, uniforms_N: torch.Tensor) -> torch.Tensor:
    """First the block, then the token in it, so that few numbers are added up in float64."""
    block_N, share_N = _invert_cdf(sums_NB, uniforms_N)
    chosen_NC = blocks_NBC[torch.arange(len(block_N), device=block_N.device), block_N]
    return block_N * BLOCK + _invert_cdf(chosen_NC.double(), share_N)[0]


def _from_likeliest(
    below_NV: torch.Tensor, sums_N1: torch.Tensor, uniforms_N: torch.Tensor, top_p: float, top_k: int
) -> torch.Tensor:
    vocab = below_NV.shape[1]
    if 0 < top_k < vocab:
        kept_NX, tokens_NX = below_NV.topk(top_k, dim=1)
    else:
        kept_NX, tokens_NX = below_NV.sort(dim=1, descending=True)
    probs_NX = kept_NX.double().exp()
    if top_p < 1.0:
        total_N1 = probs_NX.sum(dim=1, keepdim=True) if 0 < top_k < vocab else sums_N1
        before_NX = probs_NX.cumsum(dim=1) - probs_NX
        probs_NX = probs_NX * (before_NX < top_p * total_N1)
    tokens_NX, order_NX = tokens_NX.sort(dim=1)
    found_N, _ = _invert_cdf(probs_NX.gather(1, order_NX), uniforms_N)
    return tokens_NX.gather(1, found_N[:, None])[:, 0]


def _invert_cdf(probs_NX: torch.Tensor, uniforms_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place whose cumulative share exceeds the number, and how far through its share that is, in [0, 1)."""
    cdf_NX = probs_NX.cumsum(dim=1)
    threshold_N1 = uniforms_N[:, None] * cdf_NX[:, -1:]
    found_N1 = torch.searchsorted(cdf_NX, threshold_N1, right=True)
    # Rounding may leave none above it: then the last place with a probability. Among NaN there is none either.
    last_N1 = torch.searchsorted(cdf_NX, cdf_NX[:, -1:].contiguous()).clamp_max(probs_NX.shape[1] - 1)
    found_N1 = torch.minimum(found_N1, last_N1)
    own_N1 = probs_NX.gather(1, found_N1)
    through_N1 = (threshold_N1 - (cdf_NX.gather(1, found_N1) - own_N1)) / own_N1
    return found_N1[:, 0], through_N1[:, 0].clamp(0.0, BELOW_ONE)
