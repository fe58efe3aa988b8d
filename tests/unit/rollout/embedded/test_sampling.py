import math

import pytest
import torch

from gspo_moe.kernels import decode
from gspo_moe.rollout.embedded.sampling import sample, uniforms

# Probabilities 0.4, 0.1, 0.3, 0.2 and the bounds of their cumulative sum.
PROBS = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
EVERY = {0, 1, 2, 3}
LAST = 1 - 2**-53


@pytest.fixture(params=["kernels", "operators"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operators":
        monkeypatch.setattr(decode, "suits", lambda weight: False)


def tokens(
    draws: list[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, probs: torch.Tensor = PROBS
) -> list[int]:
    logits = probs.log().float().expand(len(draws), -1)
    found, _ = sample(logits, torch.tensor(draws, dtype=torch.float64), temperature, top_p, top_k)
    return found.tolist()


def reachable(top_p: float = 1.0, top_k: int = 0, probs: torch.Tensor = PROBS) -> set[int]:
    return set(tokens([i / 1000 for i in range(1000)] + [LAST], top_p=top_p, top_k=top_k, probs=probs))


def test_a_uniform_number_picks_the_token_whose_stretch_holds_it() -> None:
    assert tokens([0.0, 0.39, 0.41, 0.49, 0.51, 0.79, 0.81, LAST]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_temperature_squares_or_roots_the_probabilities() -> None:
    # T = 0.5: 0.16, 0.01, 0.09, 0.04 of 0.30. T = 2: their square roots.
    squares = (PROBS**2 / (PROBS**2).sum()).cumsum(0)
    roots = (PROBS**0.5 / (PROBS**0.5).sum()).cumsum(0)
    for temperature, bounds in ((0.5, squares), (2.0, roots)):
        below = tokens((bounds - 1e-5).tolist(), temperature)
        above = tokens((bounds[:-1] + 1e-5).tolist(), temperature)
        assert (below, above) == ([0, 1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize(("top_k", "kept"), [(0, EVERY), (1, {0}), (2, {0, 2}), (3, {0, 2, 3}), (4, EVERY), (9, EVERY)])
def test_top_k_keeps_the_likeliest(top_k: int, kept: set[int]) -> None:
    assert reachable(top_k=top_k) == kept


# 0.4 and 0.3 reach 0.7; a hair more takes the next.
@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {0}), (0.39, {0}), (0.41, {0, 2}), (0.69, {0, 2}), (0.71, {0, 2, 3}), (0.91, EVERY), (1.0, EVERY)],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert reachable(top_p=top_p) == kept


def test_top_p_applies_to_what_top_k_left() -> None:
    # Of 0.4, 0.3, 0.2 the first has 0.444 and the first two 0.778.
    assert reachable(top_k=3, top_p=0.44) == {0}
    assert reachable(top_k=3, top_p=0.45) == {0, 2}
    assert reachable(top_k=3, top_p=0.79) == {0, 2, 3}


def test_a_truncated_distribution_is_renormalised() -> None:
    # Tokens 0 and 2 at 4/7 and 3/7.
    assert tokens([0.571, 0.572], top_k=2) == [0, 2]
    assert tokens([0.571, 0.572], top_p=0.6) == [0, 2]


def test_ties_are_cut_to_exactly_k() -> None:
    even = torch.full((8,), 1 / 8, dtype=torch.float64)
    assert len(reachable(top_k=3, probs=even)) == 3
    assert len(reachable(top_p=0.49, probs=even)) == 4
    assert reachable(probs=even) == set(range(8))


def test_a_token_without_probability_is_never_taken() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert tokens([0.0, 0.499, 0.501, LAST], probs=probs) == [1, 1, 3, 3]


def test_greedy_takes_the_likeliest_whatever_the_number() -> None:
    assert tokens([0.0, 0.5, LAST], temperature=0.0) == [0, 0, 0]


@pytest.mark.parametrize(("temperature", "reported_at"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 2)])
def test_log_probs_are_of_the_untruncated_distribution(
    temperature: float, reported_at: float, top_p: float, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=generator)
    draws = torch.rand(50, generator=generator, dtype=torch.float64)
    picked, log_probs = sample(logits, draws, temperature, top_p, top_k)
    expected = torch.log_softmax(logits.double() / reported_at, dim=1)[torch.arange(50), picked]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=1e-5)


def test_rows_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, draws = torch.randn(20, 30, generator=generator), torch.rand(20, generator=generator, dtype=torch.float64)
    together, _ = sample(logits, draws, 0.9, top_p=0.8, top_k=12)
    alone = [sample(logits[i : i + 1], draws[i : i + 1], 0.9, top_p=0.8, top_k=12)[0].item() for i in range(20)]
    assert together.tolist() == alone


@pytest.mark.parametrize(("top_p", "expected"), [(1.0, [0.4, 0.1, 0.3, 0.2]), (0.6, [4 / 7, 0, 3 / 7, 0])])
def test_frequencies_are_binomial(top_p: float, expected: list[float]) -> None:
    count = 100_000
    draws = uniforms(["frequencies"], count)[0]
    picked, _ = sample(PROBS.log().float().expand(count, -1), draws, 1.0, top_p=top_p)
    for found, p in zip((picked.bincount(minlength=4) / count).tolist(), expected, strict=True):
        assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / count)


def test_uniform_numbers_depend_on_the_key_alone() -> None:
    alone = uniforms(["b"], 5)
    assert torch.equal(uniforms(["a", "b", "c"], 5)[1:2], alone)
    assert torch.equal(uniforms(["b", "b"], 9)[:, :5], alone.expand(2, 5))
    rows = uniforms([f"1/train/{prompt}/{number}" for prompt in range(30) for number in range(30)], 4)
    assert len(set(rows.flatten().tolist())) == rows.numel()


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    values = uniforms([f"key {i}" for i in range(200)], 500)
    assert values.dtype == torch.float64
    assert 0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    # Of 100,000: mean 1/2 and variance 1/12, and neighbours across keys and steps are uncorrelated.
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / values.numel())
    assert abs(values.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / values.numel())
    centred = values - 0.5
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(product.mean()) < 4 / 12 / math.sqrt(product.numel())
