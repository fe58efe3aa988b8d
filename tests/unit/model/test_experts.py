"""Stacked experts against megatron-core's SequentialMLP with the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.model.build import _mark_tensor_parallel
from gspo_moe.model.experts import GroupedExperts, StackedShard, with_zeros_for_empty
from gspo_moe.model.sharded import stored, with_data
from gspo_moe.model.spec import transformer_config
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.platform import choose_backends
from tests.qwen3 import architecture, layout

LINEARS = ("linear_fc1", "linear_fc2")
EXPERTS = 5


@contextlib.contextmanager
def both(dtype: str, **sizes: int) -> Iterator[tuple[GroupedExperts, Any]]:
    """Ours and megatron-core's, of the same random weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    config = Config.model_validate({"model": {"preset": "tiny", "dtype": dtype, "backend": "local"}})
    initialize(layout(), seed=1)
    try:
        backends = choose_backends(dict(config.model.backend), dtype)
        megatron = transformer_config(architecture(**sizes), layout(), config, backends)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        ours = GroupedExperts(EXPERTS, megatron, pg_collection=groups)
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        theirs: Any = SequentialMLP(EXPERTS, megatron, linears, pg_collection=groups)
        _mark_tensor_parallel(theirs)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name in LINEARS:
                stacked = getattr(ours, name).weight
                stacked.copy_(torch.randn(stacked.shape, generator=generator))
                for expert, weight in zip(theirs.local_experts, stacked, strict=True):
                    getattr(expert, name).weight.copy_(weight)
        yield ours, theirs
    finally:
        shut_down()


def run(module: Any, counts: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients of inputs, gate weights (fp32) and all experts' weights, stacked."""
    generator = torch.Generator().manual_seed(4)
    hidden_NH = torch.randn(sum(counts), 32, generator=generator).to(dtype).requires_grad_()
    probs_N = torch.rand(sum(counts), generator=generator).requires_grad_()
    module.zero_grad()
    out, bias = module(hidden_NH, torch.tensor(counts), probs_N)
    assert bias is None
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    assert hidden_NH.grad is not None
    assert probs_N.grad is not None
    found = {"out": out.detach(), "hidden": hidden_NH.grad, "probs": probs_N.grad}
    for name in LINEARS:
        if isinstance(module, GroupedExperts):
            found[name] = getattr(module, name).weight.grad
        else:
            found[name] = torch.stack([getattr(expert, name).weight.grad for expert in module.local_experts])
    return found


@pytest.mark.parametrize("counts", [(3, 0, 7, 1, 4), (0, 9, 0, 0, 0), (0, 0, 0, 0, 0)])
# Rows of 6 numbers do not begin at multiples of 16 bytes, which torch's grouped product wants, nor do some experts'
# stacked weights, which MKL's products may round otherwise.
@pytest.mark.parametrize("width", [24, 6])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_outputs_and_gradients_are_megatrons_bit_for_bit(dtype: str, width: int, counts: tuple[int, ...]) -> None:
    with both(dtype, moe_intermediate_size=width) as (ours, theirs):
        kind = next(ours.parameters()).dtype
        found, expected = run(ours, counts, kind), run(theirs, counts, kind)
        for name, value in expected.items():
            assert torch.equal(found[name], value) or width == 6, name
            torch.testing.assert_close(found[name], value, msg=name)
        assert found["out"].abs().sum() > 0 or not any(counts)
        for name in LINEARS:
            empty = [number for number, count in enumerate(counts) if not count]
            assert (found[name][empty] == 0).all(), "experts without tokens"


def test_garbage_in_an_empty_experts_gradient_becomes_zero() -> None:
    weight = torch.ones(4, 2, 3, requires_grad=True)
    gradient = torch.full((4, 2, 3), 5.0)
    gradient[[0, 2]] = float("nan")
    with_zeros_for_empty(weight, torch.tensor([0, 4, 4, 5], dtype=torch.int32)).backward(gradient)
    assert weight.grad is not None
    assert weight.grad[:, 0, 0].tolist() == [0, 5, 0, 5]
    with torch.no_grad():
        assert with_zeros_for_empty(weight.detach(), torch.tensor([1, 1, 1, 1])) is not weight


def test_parameters_carry_the_marks_that_reduction_and_norm_go_by() -> None:
    with both("fp32") as (ours, theirs):
        for name, shift in zip(LINEARS, (1, 1), strict=True):
            mine, other = getattr(ours, name).weight, getattr(theirs.local_experts[0], name).weight
            assert mine.allreduce == other.allreduce
            assert mine.tensor_model_parallel == other.tensor_model_parallel
            assert mine.partition_dim == other.partition_dim + shift


def test_checkpoints_hold_the_pieces_of_megatrons() -> None:
    offsets = ((0, 2, 6),)  # layer 2 of 6
    with both("fp32") as (ours, theirs):
        arguments: tuple[Any, ...] = ("decoder.layers.2.mlp.", offsets, {})
        shards = ours.sharded_state_dict(*arguments)
        found = {_place(piece): piece for shard in shards.values() for piece in stored(shard)}
        # Beside the weights megatron-core keeps extra states, which are empty.
        others = {name: shard for name, shard in theirs.sharded_state_dict(*arguments).items() if ".weight" in name}
        wanted = [piece for shard in others.values() for piece in stored(shard)]
        assert len(wanted) == len(found) == 3 * EXPERTS
        for piece in wanted:
            mine = found[_place(piece)]
            for field in ("local_shape", "global_shape", "axis_fragmentations", "replica_id", "prepend_axis_num"):
                assert getattr(mine, field) == getattr(piece, field)
            assert torch.equal(mine.data, piece.data)
        for shard in shards.values():
            assert isinstance(shard, StackedShard)
            other = torch.randn(shard.data.shape, dtype=torch.float64)
            loaded = [
                [half.data for half in piece] if isinstance(piece, list) else piece.data
                for piece in with_data(shard, other).build()
            ]
            assert torch.equal(shard.merge_fn(loaded), other)
            one = [piece for number in range(EXPERTS) for piece in stored(shard.part(number))]
            assert [_place(piece) for piece in one] == [_place(piece) for piece in stored(shard)]


def _place(piece: Any) -> tuple[str, tuple[int, ...]]:
    return piece.key, tuple(piece.global_offset)
