"""The split of the log-ratio against NumPy on the tokens themselves, and against what is known of made-up noise."""

import numpy as np
import pytest
import torch

from gspo_moe.errors import DataError
from gspo_moe.routing.attribution import attribution, sequence_sums


def made(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """The sums of sequences with these tokens, each behind a prompt token that does not count."""
    lengths = [len(values) + 1 for values in a]
    a_T, b_T = (torch.tensor(np.concatenate([[9.0, *each] for each in values])) for values in (a, b))
    mask_T = torch.tensor(np.concatenate([[0.0] + [1.0] * (length - 1) for length in lengths]))
    sequence_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return sequence_sums(a_T, b_T, sequence_T, mask_T)


def drawn(lengths: np.ndarray, seed: int, shared: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    a = [random.normal(0.0, 0.02, n) + random.normal(0.0, 0.01) for n in lengths]
    b = [random.normal(0.0, 0.01, n) + shared * random.normal(0.0, 0.01) for n in lengths]
    return a, b


def test_figures_are_numpys_on_the_tokens() -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 30)
    a, b = drawn(lengths, seed=2, shared=0.3)
    found = attribution(made(a, b))
    token_b, token_d = np.concatenate(b), np.concatenate(a) + np.concatenate(b)
    means_b = np.array([values.mean() for values in b])
    means_d = means_b + [values.mean() for values in a]
    expected = {
        "phi_token": np.cov(token_b, token_d)[0, 1] / token_d.var(ddof=1),
        "phi_sequence": np.cov(means_b, means_d)[0, 1] / means_d.var(ddof=1),
        "washout": lengths.mean() * means_b.var(ddof=1) / token_b.var(ddof=1),
        "design_effect": sum((values - token_b.mean()).sum() ** 2 for values in b) / len(token_b) / token_b.var(ddof=1),
    }
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected, rel=1e-10)
    assert all(low < value < high for value, low, high in found.values())


def test_packs_add_up_and_intervals_are_reproducible() -> None:
    a, b = drawn(np.full(12, 7), seed=3)
    whole = made(a, b)
    parts = np.concatenate([made(a[:5], b[:5]), made(a[5:], b[5:])])
    assert attribution(parts, seed=4) == attribution(whole, seed=4)
    assert attribution(whole, seed=4) != attribution(whole, seed=5)


@pytest.mark.parametrize(("shared", "expected"), [(0.0, 1.0), (1.0, 50.5)])
def test_washout_tells_independent_noise_from_a_sequences_own(shared: float, expected: float) -> None:
    """Shared noise of the tokens' own variance: Var_i = s^2 (1 + 1/n), Var_t = 2 s^2, so W = (n + 1) / 2."""
    a, b = drawn(np.full(2000, 100), seed=6, shared=shared)
    value, low, high = attribution(made(a, b))["washout"]
    assert value == pytest.approx(expected, rel=0.12)
    assert low < expected < high
    assert high - low < 0.3 * value


def test_only_the_design_effect_of_independent_noise_is_1_for_any_lengths() -> None:
    lengths = np.random.default_rng(1).choice([5, 200], 4000)
    a, b = drawn(lengths, seed=9)
    found = attribution(made(a, b))
    assert found["design_effect"][0] == pytest.approx(1.0, abs=0.08)
    assert found["washout"][0] == pytest.approx(lengths.mean() * (1 / lengths).mean(), rel=0.08)
    assert found["washout"][0] > 9
    a, b = drawn(np.full(2000, 100), seed=6, shared=1.0)
    assert attribution(made(a, b))["design_effect"][0] == pytest.approx(50.5, rel=0.12)


def test_intervals_cover_as_often_as_they_say() -> None:
    """phi_sequence of independent a and b is the ratio of variances; 95 of 100 intervals should hold it."""
    truth = (0.01**2 / 20) / (0.01**2 / 20 + 0.02**2 / 20 + 0.01**2)
    hits = 0
    for seed in range(100):
        a, b = drawn(np.full(80, 20), seed=100 + seed)
        _, low, high = attribution(made(a, b))["phi_sequence"]
        hits += low <= truth <= high
    assert hits >= 88


def test_no_route_moved_gives_no_washout() -> None:
    a, b = drawn(np.full(6, 5), seed=8)
    found = attribution(made(a, [np.zeros(5) for _ in b]))
    assert found["phi_token"][0] == found["phi_sequence"][0] == 0.0
    assert np.isnan(found["washout"]).all()


def test_a_sequence_without_response_is_refused() -> None:
    tokens = torch.zeros(4)
    with pytest.raises(DataError, match="no response token"):
        sequence_sums(tokens, tokens, torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0, 0.0, 0.0]))
