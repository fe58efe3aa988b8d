"""Does a sequence's ratio wash routing noise out? Splits the log-ratio d = a + b (SPEC section 5).

a = log pi_new(old routes) - log pi_old(old routes): weights moved, routes held.
b = log pi_new(own routes) - log pi_new(old routes): only the routes moved.

All figures are functions of sums over sequences, which add up over packs and ranks and can be drawn with replacement.
Shape letters: T tokens of a pack, N sequences, F sums a sequence, R bootstrap samples.
"""

from __future__ import annotations

import numpy as np
import torch

from gspo_moe.errors import DataError

FIGURES = ("phi_token", "phi_sequence", "washout", "design_effect")
RESAMPLES = 1000


def sequence_sums(
    a_T: torch.Tensor, b_T: torch.Tensor, sequence_T: torch.Tensor, response_mask_T: torch.Tensor
) -> np.ndarray:
    """Sums over each sequence's response tokens, float64 [N, F]: count, a, b, a^2, b^2, ab.

    a_T, b_T: nats, floats [T]. sequence_T: int64, the index in N of each token's sequence. response_mask_T: 0 or 1.
    Raises DataError for a sequence without response token.
    """
    kept_T = response_mask_T > 0
    a_T, b_T = a_T.double()[kept_T], b_T.double()[kept_T]
    num_sequences = int(sequence_T[-1]) + 1
    terms_TF = torch.stack([torch.ones_like(a_T), a_T, b_T, a_T * a_T, b_T * b_T, a_T * b_T], dim=1)
    sums_NF = terms_TF.new_zeros((num_sequences, terms_TF.shape[1])).index_add(0, sequence_T[kept_T], terms_TF)
    if (sums_NF[:, 0] == 0).any():
        raise DataError("a sequence has no response token; drop it when packing")
    return sums_NF.cpu().numpy()


def attribution(sums_NF: np.ndarray, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Each of `FIGURES` with its 95 % percentile-bootstrap interval over sequences: (value, low, high).

    phi_token = Cov(b, a + b) / Var(a + b) over tokens, phi_sequence the same over sequence means.
    washout = mean |y| * Var_i(mean_t b) / Var_t(b), variances with ddof 1. Routing noise that is independent between
    tokens gives mean |y| * mean 1/|y|, which is 1 for equally long sequences; noise shared by a sequence gives more.
    design_effect = sum_i (sum_t (b_it - mean b))^2 / (sum_i |y_i| * Var_t(b)), which is 1 for independent tokens
    whatever the lengths (Kish, Survey Sampling, 1965): how much more a sequence's sum of b varies for what its tokens
    share.
    NaN where a variance is 0 or there are fewer than two sequences.
    """
    value = _figures(_features(sums_NF).sum(axis=0)[None])[0]
    drawn = np.random.default_rng(seed).multinomial(len(sums_NF), np.full(len(sums_NF), 1 / len(sums_NF)), RESAMPLES)
    draws = _figures(drawn @ _features(sums_NF))
    low, high = (np.full(len(FIGURES), np.nan) for _ in range(2))
    for column in range(len(FIGURES)):
        finite = draws[np.isfinite(draws[:, column]), column]
        if np.isfinite(value[column]) and len(finite):
            low[column], high[column] = np.percentile(finite, (2.5, 97.5))
    return {name: (float(value[i]), float(low[i]), float(high[i])) for i, name in enumerate(FIGURES)}


def _features(sums_NF: np.ndarray) -> np.ndarray:
    """What adds up over sequences: 1, the six sums, products of a sequence's means of a and b, of its length and b."""
    count_N, b_sum_N = sums_NF[:, 0], sums_NF[:, 2]
    a_N, b_N = sums_NF[:, 1] / count_N, b_sum_N / count_N
    ones_N, sums = np.ones(len(sums_NF)), [b_sum_N**2, b_sum_N * count_N, count_N**2]
    return np.column_stack([ones_N, sums_NF, a_N, b_N, a_N**2, b_N**2, a_N * b_N, *sums])


def _figures(totals_RF: np.ndarray) -> np.ndarray:
    """The figures [R, 4] of R samples of sequences, from the sums of their features."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sequences, tokens, *token_sums = totals_RF[:, :7].T
        phi_token, var_b_token = _share(tokens, *token_sums)
        phi_sequence, var_b_sequence = _share(sequences, *totals_RF[:, 7:12].T)
        washout = tokens / sequences * var_b_sequence / var_b_token
        mean_b, (bb, b_count, count_count) = totals_RF[:, 3] / tokens, totals_RF[:, 12:].T
        of_sums = bb - 2 * mean_b * b_count + mean_b**2 * count_count
        found = np.column_stack([phi_token, phi_sequence, washout, of_sums / (tokens * var_b_token)])
    return np.where(np.isfinite(found), found, np.nan)


def _share(
    count: np.ndarray, a: np.ndarray, b: np.ndarray, aa: np.ndarray, bb: np.ndarray, ab: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cov(b, a + b) / Var(a + b), and Var(b) with ddof 1, from the sums of `count` pairs."""
    var_a, var_b, cov = (aa - a * a / count), (bb - b * b / count), (ab - a * b / count)
    return (var_b + cov) / (var_a + var_b + 2 * cov), var_b / (count - 1)
