"""The kernels of decode steps against float64, at sizes that fill vectors and registers and at such that do not."""

import pytest
import torch
import torch.nn.functional as F

from gspo_moe.kernels import decode
from gspo_moe.kernels.library import kernels

pytestmark = pytest.mark.skipif(kernels().cpu is None, reason="no kernels are built")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 13, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (4, 16), (61, 30), (130, 256), (9, 1100)])
def test_a_product_of_any_size(rows: int, outputs: int, inputs: int) -> None:
    values, weight = drawn(rows, inputs), drawn(outputs, inputs, seed=1) / inputs**0.5
    close(decode.linear(values, decode.pack(weight), outputs), values.double() @ weight.double().T)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_norm(size: int) -> None:
    values, weight = drawn(5, size), drawn(size, seed=1)
    close(decode.norm(values, weight, 1e-3), F.rms_norm(values.double(), (size,), weight.double(), 1e-3))


def rotated(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    left, right = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-right, left], dim=-1) * sine


@pytest.mark.parametrize(("groups", "queries", "size"), [(2, 1, 2), (1, 3, 6), (2, 2, 32), (1, 8, 40)])
def test_attention_sees_the_row_up_to_the_new_token_and_keeps_it(groups: int, queries: int, size: int) -> None:
    positions = torch.tensor([0, 3, 20, 16])
    rows, capacity = len(positions), 21
    qkv = drawn(rows, groups, queries + 2, size)
    norms = (drawn(size, seed=1), drawn(size, seed=2))
    cosines, sines = drawn(capacity, size, seed=3), drawn(capacity, size, seed=4)
    cache = tuple(drawn(rows + 1, groups, capacity, size, seed=seed) for seed in (5, 6))
    before = [buffer.double().clone() for buffer in cache]
    found = decode.attention(qkv, norms, 1e-6, (cosines, sines), positions, (cache[0], cache[1]))

    q, k = (F.rms_norm(x.double(), (size,), w.double(), 1e-6) for x, w in zip((qkv, qkv), norms, strict=True))
    for row, position in enumerate(positions.tolist()):
        factors = cosines[position].double(), sines[position].double()
        before[0][row, :, position] = rotated(k[row, :, queries], *factors)
        before[1][row, :, position] = qkv[row, :, queries + 1].double()
        heads = rotated(q[row, :, :queries], *factors)
        keys, values = (buffer[row, :, : position + 1] for buffer in before)
        weights = (heads @ keys.transpose(1, 2) / size**0.5).softmax(-1)
        close(found[row].view(groups, queries, size), weights @ values)
    for buffer, expected in zip(cache, before, strict=True):
        close(buffer, expected)


def test_attention_refuses_a_position_beyond_the_cache() -> None:
    cache = (torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    ones, factors = torch.ones(2), (torch.ones(8, 2), torch.ones(8, 2))
    with pytest.raises(RuntimeError, match="a position is beyond the cache"):
        decode.attention(torch.zeros(1, 1, 3, 2), (ones, ones), 1e-6, factors, torch.tensor([4]), cache)


@pytest.mark.parametrize(("start", "count"), [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize(("hidden", "width", "rows"), [(30, 13, 7), (64, 16, 40), (8, 1, 0)])
def test_experts_add_up_what_is_here(start: int, count: int, hidden: int, width: int, rows: int) -> None:
    values = 3 * drawn(rows, hidden)
    first, second = drawn(6, 2 * width, hidden, seed=1), drawn(6, hidden, width, seed=2) / 4
    shares, routes = drawn(rows, 6, seed=3).softmax(1).topk(2, dim=1)
    here = slice(start, start + count)
    panels = [decode.pack(weight[here].contiguous()) for weight in (first, second)]
    found = decode.experts(values, shares, routes, panels[0], panels[1], start)
    expected = torch.zeros(rows, hidden, dtype=torch.float64)
    for row in range(rows):
        for share, expert in zip(shares[row].double(), routes[row].tolist(), strict=True):
            if start <= expert < start + count:
                gate, up = (first[expert].double() @ values[row].double()).chunk(2)
                expected[row] += share * (second[expert].double() @ (F.silu(gate) * up))
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_gate_far_from_zero_is_one_or_nothing() -> None:
    first = torch.tensor([[[200.0], [1.0]], [[-200.0], [1.0]]])
    values, shares = torch.tensor([[2.0]]), torch.ones(1, 2)
    found = decode.experts(
        values, shares, torch.tensor([[0, 1]]), decode.pack(first), decode.pack(torch.ones(2, 1, 1)), 0
    )
    assert found.tolist() == [[800.0]]


def drawn_by_reference(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    cdf = (logits.double() / temperature).softmax(1).cumsum(1)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 1000, 8192])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_are_where_the_cumulative_probability_passes_the_number(vocab: int, temperature: float) -> None:
    rows = 64
    logits = 3 * drawn(rows, vocab + 3)[:, :vocab]  # rows that do not lie end to end
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, log_probs = decode.draw(logits, uniforms, temperature)
    assert tokens.tolist() == drawn_by_reference(logits, uniforms, temperature).tolist()
    expected = (logits.double() / temperature).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    close(log_probs, expected)


def test_the_greedy_draw_is_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, -1.0, 0.0, 1.0]])
    tokens, log_probs = decode.draw(logits, torch.zeros(2, dtype=torch.float64), 0.0)
    assert tokens.tolist() == [1, 0]
    close(log_probs, logits.double().log_softmax(1).amax(1))


def test_draws_never_take_what_has_no_probability() -> None:
    logits = torch.full((3, 700), -torch.inf)
    logits[:, [3, 300]] = 0.0
    tokens, log_probs = decode.draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [3, 300, 300]
    close(log_probs, torch.full((3,), 0.5, dtype=torch.float64).log())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 300, 699])
def test_a_draw_from_what_is_not_finite_says_so(bad: float, place: int) -> None:
    logits = drawn(1, 700)
    logits[0, place] = bad
    for temperature in (0.0, 1.0):
        tokens, log_probs = decode.draw(logits, torch.tensor([0.7], dtype=torch.float64), temperature)
        assert 0 <= tokens.item() < 700
        assert log_probs.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="do not fit each other"):
        decode.linear(torch.zeros(2, 3), decode.pack(torch.zeros(2, 4)), 2)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        decode.linear(torch.zeros(2, 3), decode.pack(torch.zeros(2, 3)), 17)
    with pytest.raises(RuntimeError, match="must be float32"):
        decode.pack(torch.zeros(2, 3, dtype=torch.float64))
