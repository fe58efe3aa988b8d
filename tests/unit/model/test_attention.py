"""Who attends to whom, against float64 attention written out, and what the kernels are called with."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_moe.model import torch_attention
from gspo_moe.model.attention import AttentionParams, context_params, decode_params, packed_params, rotate
from gspo_moe.model.cache import CacheSlots, KVCache
from gspo_moe.model.torch_attention import TorchAttention, causal_from_the_end, on_grid
from gspo_moe.parallel.context import ContextSplit
from tests.qwen3 import architecture

SIZES = architecture(num_attention_heads=6, num_key_value_heads=2, head_dim=16)
HEADS, GROUPS, SIZE = SIZES.num_attention_heads, SIZES.num_key_value_heads, SIZES.head_dim


def attended(query_QHD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor) -> torch.Tensor:
    """Causal from the ends, float64 [Q, H * D]: query q sees the keys up to K - Q + q."""
    query, key, value = query_QHD.double(), key_KGD.double(), value_KGD.double()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores_HQK = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    hidden = torch.arange(len(key)) > torch.arange(len(query))[:, None] + len(key) - len(query)
    weights_HQK = scores_HQK.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights_HQK, value).flatten(1)


def tensors(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Queries [first length, H, D], then keys and values [other lengths, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, *[GROUPS] * (len(lengths) - 1))
    return [torch.randn(n, count, SIZE, generator=generator) for n, count in zip(lengths, heads, strict=True)]


def varlen_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    **grouped: bool,
) -> torch.Tensor:
    """torch's varlen_attn as its documentation says, of flash attention's causality: aligned at the ends."""
    assert window_size == (-1, 0)
    assert grouped in ({}, {"enable_gqa": True})
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    pieces = [x.split(bounds.diff().tolist()) for x, bounds in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))]
    return torch.cat([attended(*piece) for piece in zip(*pieces, strict=True)]).view(query.shape).to(query.dtype)


def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "suits_varlen", lambda _: True)
    monkeypatch.setattr(torch_attention, "flash_attention", lambda: varlen_on_cpu)


def run(params: AttentionParams, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return TorchAttention(None, layer_number=1)(query, key, value, None, packed_seq_params=params)


@pytest.mark.parametrize("lengths", [(7, 1, 11), (5, 5, 5)])
@pytest.mark.parametrize("kernel", ["grid", "varlen"])
def test_each_sequence_of_a_pack_sees_itself(
    kernel: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "varlen":
        flash(monkeypatch)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    params = packed_params(positions, bounds, SIZES, torch.float32)
    query, key, value = tensors(*[sum(lengths)] * 3)
    turned = [rotate(x, params.cos_TD, params.sin_TD) for x in (query, key)]
    pieces = [x.split(lengths) for x in (*turned, value)]
    expected = torch.cat([attended(*piece) for piece in zip(*pieces, strict=True)])
    torch.testing.assert_close(run(params, query, key, value).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["masks", "varlen"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_context_parallel_rank_sees_its_sequences_so_far(
    rank: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "varlen":
        flash(monkeypatch)
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    split = ContextSplit(torch.tensor([0, 13, 14, 22]), group)
    positions = torch.cat([torch.arange(13), torch.arange(1), torch.arange(8)])
    query, key, value = tensors(22, 22, 22)
    expected = torch.cat(
        [attended(*piece) for piece in zip(*(x.split([13, 1, 8]) for x in (query, key, value)), strict=True)]
    )
    # Other ranks' keys as gathering lays them out: rank by rank, each with its padding.
    padded = max(split.counts)
    gathered = [torch.zeros(2 * padded, *x.shape[1:]) for x in (key, value)]
    for other in range(2):
        theirs = (split.rank_T == other).nonzero()[:, 0]
        for whole, x in zip(gathered, (key, value), strict=True):
            whole[other * padded : other * padded + len(theirs)] = x[theirs]
    missing = padded - split.num_local
    params = context_params(F.pad(split.local(positions), (0, missing)), split, SIZES, torch.float32)
    local = F.pad(split.local(query), (0, 0, 0, 0, 0, missing))
    keys, values = (whole[params.keys_K] for whole in gathered)
    found = TorchAttention(None, 1).over_stretches(local, keys, values, params)
    torch.testing.assert_close(found[: split.num_local].double(), split.local(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (4, 9), (9, 17), (8, 8)])
def test_long_stretches_are_masked_a_few_queries_at_a_time(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "MASKED_QUERIES", 4)
    inputs = [x.requires_grad_() for x in tensors(queries, keys, keys)]
    found, expected = causal_from_the_end(*inputs), attended(*inputs)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for actual, reference in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, reference, atol=5e-6, rtol=0)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: numbers read from tensors, and shapes that depend on them."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "repeat_interleave",
        "_unique2",
        "equal",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_order", [False, True])
def test_a_new_token_sees_its_row_so_far_and_waits_for_nothing(in_order: bool) -> None:
    lengths = (5, 1, 3)
    rows = [0, 1, 2] if in_order else [2, 0, 3]
    cache = KVCache(rows=5, capacity=8)
    rows_T = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
    filled = torch.cat([torch.arange(length) for length in lengths])
    prompt = tensors(9, 9, 9)
    cache.write(1, rows_T, filled, *prompt[1:])
    query, key, value = tensors(3, 3, 3, seed=2)
    with NoWaiting():
        slots = CacheSlots(cache, torch.tensor(rows), torch.tensor(lengths), in_order)
        params = decode_params(slots, 7, SIZES, torch.float32)
        found = run(params, query, key, value)
    turned_query, turned_key = (rotate(x, params.cos_TD, params.sin_TD) for x in (query, key))
    before = [x.split(lengths) for x in prompt[1:]]
    for number in range(3):
        keys = torch.cat([before[0][number], turned_key[number : number + 1]])
        values = torch.cat([before[1][number], value[number : number + 1]])
        expected = attended(turned_query[number : number + 1], keys, values)
        torch.testing.assert_close(found[number : number + 1].double(), expected, atol=2e-6, rtol=0)


def test_a_grid_needs_no_wait_but_the_one_for_its_size() -> None:
    params = packed_params(torch.arange(6) % 4, torch.tensor([0, 4, 6]), SIZES, torch.float32)
    assert params.max_seqlen_q == 4
    assert params.grid_slot_T.tolist() == [0, 1, 2, 3, 4, 5]
    query, key, value = tensors(6, 6, 6)
    with NoWaiting():
        on_grid(query, key, value, params)


def test_rows_are_copied_where_they_lie() -> None:
    cache = KVCache(rows=4, capacity=5)
    written = [torch.randn(4, GROUPS, SIZE), torch.randn(4, GROUPS, SIZE)]

    def write(positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return cache.write(3, torch.arange(4), torch.tensor(positions), *written)

    write([0, 1, 2, 3])
    keys, values = write([1, 0, 4, 1])
    places = (keys.data_ptr(), values.data_ptr())
    before = [keys.clone(), values.clone()]
    cache.copy([3, 2], [0, 1], used=4)
    assert (keys.data_ptr(), values.data_ptr()) == places
    for buffer, old in zip((keys, values), before, strict=True):
        assert torch.equal(buffer[:2, :, :4], old[[3, 2], :, :4])
        assert torch.equal(buffer[2:], old[2:])
        assert torch.equal(buffer[:2, :, 4:], old[:2, :, 4:])
