"""Picks tokens from logits: pure maths, reproducible from (seed, prompt, sample) whatever shares the batch.

Shape letters: N sequences, V the whole vocabulary, R response tokens at most, B blocks of C tokens, X tokens or blocks.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from gspo_moe.kernels import decode

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
    whole = greedy or (top_p == 1.0 and not top_k)
    if whole and decode.suits(logits_NV):
        return decode.draw(logits_NV, uniforms_N, temperature)
    scaled_NV = logits_NV.float() if greedy or temperature == 1.0 else logits_NV.float() / temperature
    below_NV = scaled_NV - scaled_NV.amax(dim=-1, keepdim=True)
    blocks_NBC = _blocks(below_NV)
    sums_NB = blocks_NBC.sum(dim=2).double()
    if greedy:
        tokens_N = below_NV.argmax(dim=-1)
    elif not whole:
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
    cdf_NB = sums_NB.cumsum(dim=1)
    threshold_N1 = uniforms_N[:, None] * cdf_NB[:, -1:]
    block_N1 = _first_above(cdf_NB, threshold_N1)
    own_N1 = sums_NB.gather(1, block_N1)
    before_N1 = cdf_NB.gather(1, block_N1) - own_N1
    chosen_NC = blocks_NBC.gather(1, block_N1[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    cdf_NC = chosen_NC.cumsum(dim=1, dtype=torch.float64)
    share_N1 = ((threshold_N1 - before_N1) / own_N1).clamp(0.0, BELOW_ONE)
    return (block_N1 * BLOCK + _first_above(cdf_NC, share_N1 * cdf_NC[:, -1:]))[:, 0]


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
    cdf_NX = probs_NX.gather(1, order_NX).cumsum(dim=1)
    return tokens_NX.gather(1, _first_above(cdf_NX, uniforms_N[:, None] * cdf_NX[:, -1:]))[:, 0]


def _first_above(cdf_NX: torch.Tensor, threshold_N1: torch.Tensor) -> torch.Tensor:
    """The first place [N, 1] whose sum exceeds the threshold; the last with a share where rounding leaves none."""
    found_N1 = torch.searchsorted(cdf_NX, threshold_N1, right=True)
    last_N1 = torch.searchsorted(cdf_NX, cdf_NX[:, -1:].contiguous())
    return torch.minimum(found_N1, last_N1).clamp_max(cdf_NX.shape[1] - 1)  # among NaN there is neither
