"""The experts of a layer as two stacked weights and two grouped matrix products, by torch alone.

megatron-core's SequentialMLP has two parameters an expert and starts some nine kernels for each; here a layer has two
parameters [E, O, I] and starts two products for all experts. Checkpoints hold what SequentialMLP's would, piece by
piece, and a slice of a parameter is what `model.names` knows as one expert's.

Invariants: results and gradients are SequentialMLP's, on the CPU bit for bit where every row is aligned; an expert
without tokens gets a gradient of zeros; no number of tokens is waited for where torch has a grouped kernel.

Shape letters: N rows, by expert, one for each expert that a token goes to, E local experts, H hidden, F this rank's
part of an expert's width, O and I a linear layer's outputs and inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_moe.model.swiglu import weighted_swiglu
from gspo_moe.platform import device

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes: rows of every operand of torch's grouped product begin at multiples of it
BLACKWELL = 10  # compute capability from which the product leaves garbage in an empty group's gradient (pytorch 172439)

Part: TypeAlias = ShardedTensor | ShardedTensorFactory


def grouped_linear(rows_NI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Each expert's product with its own rows, [N, O]; rows of expert e end before ends_E[e] (int32).

    On a GPU torch has a kernel for bf16 alone (compute capability 9.0 and later); for other dtypes and older GPUs it
    reads ends_E back and starts a product an expert, as is done here for what it refuses.
    """
    if not len(rows_NI):
        return rows_NI @ weight_EOI[0].T  # torch's kernel takes no empty operand
    if not _has_grouped_product(weight_EOI):
        parts = rows_NI.tensor_split(ends_E[:-1].cpu().long())
        return torch.cat([part @ weight_OI.T for part, weight_OI in zip(parts, weight_EOI, strict=True)])
    if rows_NI.is_cuda and torch.cuda.get_device_capability(rows_NI.device)[0] >= BLACKWELL:
        weight_EOI = with_zeros_for_empty(weight_EOI, ends_E)
    return F.grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=ends_E)


def _has_grouped_product(weight_EOI: torch.Tensor) -> bool:
    _, outputs, inputs = weight_EOI.shape
    aligned = all(size * weight_EOI.element_size() % ALIGNMENT == 0 for size in (outputs, inputs))
    return aligned and weight_EOI.dtype in GROUPED_DTYPES


def with_zeros_for_empty(weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The same weights, whose gradient is zero for experts without rows, whatever comes back for them."""
    if not weight_EOI.requires_grad:
        return weight_EOI
    empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    weight_EOI = weight_EOI.view_as(weight_EOI)
    weight_EOI.register_hook(lambda grad_EOI: grad_EOI.masked_fill(empty_E[:, None, None], 0))
    return weight_EOI


@dataclass
class StackedShard(ShardedTensorFactory):
    """A stacked parameter as checkpoints hold it; parts: each expert's own shard, by an earlier key."""

    parts: list[Part] = field(default_factory=list)

    def part(self, expert: int) -> Part:
        return replace(self.parts[expert], key=self.key, replica_id=self.replica_id)


class GroupedLinear(torch.nn.Module):
    """One linear layer of every local expert: weight [E, O, I], uninitialised, and no bias.

    shard_dim: dimension of one expert's weight that expert tensor parallelism cuts.
    """

    def __init__(self, shape: tuple[int, int, int], shard_dim: int, config: TransformerConfig) -> None:
        super().__init__()
        place = None if config.use_cpu_initialization else device().torch_device
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=place))
        weight: Any = self.weight
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=1 + shard_dim, stride=1)
        weight.allreduce = config.expert_model_parallel_size == 1  # else the other expert ranks have other experts
        self.shard_dim = shard_dim

    def forward(self, rows_NI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        return grouped_linear(rows_NI, self.weight, ends_E)


class GroupedExperts(MegatronModule):
    """SwiGLU experts of a Qwen3 MoE, with SequentialMLP's interface towards MoELayer."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.groups = pg_collection
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = GroupedLinear((num_local_experts, 2 * width, hidden), 0, config)
        self.linear_fc2 = GroupedLinear((num_local_experts, hidden, width), 1, config)

    def forward(
        self, hidden_NH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """The experts' outputs [N, H], weighted by the gate, and no bias; tokens_per_expert: int64 [E], any device."""
        ends_E = tokens_per_expert.cumsum(0).to(hidden_NH.device, torch.int32, non_blocking=True)
        return self.run(hidden_NH, ends_E, probs_N), None

    def run(self, hidden_NH: torch.Tensor, ends_E: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
        """The same; ends_E: where each expert's rows end, int32. Rows behind the last end come back as anything."""
        inner_NF = weighted_swiglu(self.linear_fc1(hidden_NH, ends_E), probs_N)
        return self.linear_fc2(inner_NF, ends_E)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, StackedShard]:
        """Both weights under the keys, and cut into the pieces, of SequentialMLP's."""
        found = {}
        for name, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            parts = [
                self._expert_shard(f"{prefix}experts.{name}.weight", number, weight, linear.shard_dim, sharded_offsets)
                for number, weight in enumerate(linear.weight)
            ]
            found[f"{prefix}{name}.weight"] = StackedShard(
                parts[0].key, linear.weight, _build_of(parts), _merge, parts[0].replica_id, parts=parts
            )
        return found

    def _expert_shard(
        self, key: str, number: int, weight_OI: torch.Tensor, shard_dim: int, offsets: tuple[Any, ...]
    ) -> Part:
        """One expert's weight; the first layer's goes apart into its gate and its up half."""
        expert, tensor = self.groups.ep, self.groups.expt_tp
        count = self.linear_fc1.weight.shape[0]
        offsets = (*offsets, (len(offsets), expert.rank() * count + number, expert.size() * count))
        shard = ShardedTensor.from_rank_offsets(
            key,
            weight_OI,
            *offsets,
            (len(offsets) + shard_dim, tensor.rank(), tensor.size()),
            replica_id=(0, 0, self.groups.expt_dp.rank()),
            prepend_axis_num=len(offsets),
        )
        return shard if shard_dim else apply_swiglu_sharded_factory(shard, offsets)


def _build_of(parts: list[Part]) -> Any:
    """What makes a stacked tensor's pieces: each expert's, one after another."""

    def build(key: str, stacked: torch.Tensor, replica_id: Any, _: Any = None) -> list[Any]:
        pieces: list[Any] = []
        for part, values in zip(parts, stacked, strict=True):
            if isinstance(part, ShardedTensorFactory):
                pieces.append(part.build_fn(key, values, replica_id, None))
            else:
                pieces.append(replace(part, key=key, data=values, dtype=values.dtype, replica_id=replica_id))
        return pieces

    return build


@torch.no_grad()
def _merge(pieces: list[Any]) -> torch.Tensor:
    """The inverse of `build`."""
    return torch.stack([torch.cat(piece) if isinstance(piece, list) else piece for piece in pieces])
