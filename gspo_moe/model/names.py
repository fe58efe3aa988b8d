"""One table between Megatron's parameters and the tensors of HF's Qwen3MoeForCausalLM; loading and export share it.

Every HF tensor is either copied to all ranks or cut into equal parts along one dimension. A parameter is this rank's
parts of its HF tensors, joined on dimension 0 in blocks: `linear_qkv` holds, for each KV group, its q heads, k and v;
expert `linear_fc1` holds the gate part, then the up part. The vocabulary's last part is filled up with zero rows.

Invariant: `separate(join(parts)) == parts`, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gspo_moe.config.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
VALUE_HEAD = "value_head.weight"  # Megatron's name of what HF's model has no tensor for


class _Row(NamedTuple):
    """hf_names: what the parameter is joined from. cut_dim: None for a copy on each rank."""

    hf_names: tuple[str, ...]
    cut_dim: int | None = None


_MODEL = {
    "embedding.word_embeddings.weight": _Row((EMBEDDING,), 0),
    "decoder.final_layernorm.weight": _Row(("model.norm.weight",)),
    "output_layer.weight": _Row((LM_HEAD,), 0),
}
_QKV = "self_attention.linear_qkv.weight"
_LAYER = {
    "input_layernorm.weight": _Row(("input_layernorm.weight",)),
    _QKV: _Row(("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), 0),
    "self_attention.q_layernorm.weight": _Row(("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": _Row(("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": _Row(("self_attn.o_proj.weight",), 1),
    "pre_mlp_layernorm.weight": _Row(("post_attention_layernorm.weight",)),
    "mlp.router.weight": _Row(("mlp.gate.weight",)),
}
_EXPERT = {
    "linear_fc1.weight": _Row(("gate_proj.weight", "up_proj.weight"), 0),
    "linear_fc2.weight": _Row(("down_proj.weight",), 1),
}
_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# The numbered weights of Transformer Engine's grouped linear layers, and slices of ours numbered likewise.
_IN_GROUP = re.compile(r"mlp\.experts\.(?P<name>.+\.weight)(?P<expert>\d+)")


@dataclass(frozen=True)
class Place:
    """Where a chunk of the model stands.

    tensor, expert_tensor: this rank and the number of ranks of the group.
    layers: number, from 0, in the whole model of each of the chunk's layers.
    first_expert: number in the whole layer of local expert 0.
    """

    tensor: tuple[int, int]
    expert_tensor: tuple[int, int]
    layers: tuple[int, ...]
    first_expert: int


@dataclass(frozen=True)
class Entry:
    """One parameter of one rank, and the HF tensors it is made from.

    hf_names, hf_shapes: the whole HF tensors, in the order in which their parts are joined.
    cut_dim: their dimension of which this rank holds part `index` of `count`; None where it holds all.
    blocks: blocks of the parameter's dimension 0, each with a share of every part.
    """

    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    cut_dim: int | None
    index: int
    count: int
    blocks: int

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of one whole HF tensor; what lies beyond its end is zero."""
        if self.cut_dim is None:
            return whole
        size = whole.shape[self.cut_dim]
        length = self._part_length(size)
        start = min(self.index * length, size)
        part = whole.narrow(self.cut_dim, start, min(length, size - start))
        missing = length - part.shape[self.cut_dim]
        if not missing:
            return part
        padding = list(part.shape)
        padding[self.cut_dim] = missing
        return torch.cat([part, part.new_zeros(padding)], dim=self.cut_dim)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter, from this rank's part of each HF tensor."""
        blocks = [part.unflatten(0, (self.blocks, -1)) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def separate(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part of each HF tensor, from a parameter: the inverse of `join`."""
        rows = [shape[0] // self.blocks for shape in self.part_shapes]
        parts = parameter.unflatten(0, (self.blocks, -1)).split(rows, dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    def merge(self, parameters: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The whole HF tensors, from the parameters of all `count` ranks in order; padding is dropped."""
        if self.cut_dim is None:
            return self.separate(parameters[0])
        by_tensor = zip(*(self.separate(parameter) for parameter in parameters), strict=True)
        return tuple(
            torch.cat(parts, dim=self.cut_dim).narrow(self.cut_dim, 0, shape[self.cut_dim])
            for parts, shape in zip(by_tensor, self.hf_shapes, strict=True)
        )

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(self._part_length(size) if dim == self.cut_dim else size for dim, size in enumerate(shape))
            for shape in self.hf_shapes
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        parts = self.part_shapes
        return (sum(part[0] for part in parts), *parts[0][1:])

    def _part_length(self, size: int) -> int:
        return -(-size // self.count)


def entry_of(parameter: str, architecture: Architecture, place: Place, shapes: dict[str, tuple[int, ...]]) -> Entry:
    """The table's entry for a GPTModel's parameter, by its name in `named_parameters`.

    Of a parameter that stacks experts, a name with the local expert's number behind it means that slice.
    shapes: `hf_shapes(architecture)`.
    """
    row, prefix, group, blocks = _MODEL.get(parameter), "", place.tensor, 1
    if parameter == "output_layer.weight" and architecture.tie_word_embeddings:
        row = _MODEL["embedding.word_embeddings.weight"]
    in_layer = _IN_LAYER.fullmatch(parameter)
    if in_layer:
        prefix, inner = f"model.layers.{place.layers[int(in_layer[1])]}.", in_layer[2]
        row = _LAYER.get(inner)
        if inner == _QKV:
            blocks = architecture.num_key_value_heads // place.tensor[1]
        in_expert = _IN_GROUP.fullmatch(inner)
        if in_expert:
            row, group = _EXPERT.get(in_expert["name"]), place.expert_tensor
            prefix += f"mlp.experts.{place.first_expert + int(in_expert['expert'])}."
    assert row is not None, f"no HF tensor is known for the parameter {parameter}"
    names = tuple(prefix + name for name in row.hf_names)
    index, count = (0, 1) if row.cut_dim is None else group
    return Entry(names, tuple(shapes[name] for name in names), row.cut_dim, index, count, blocks)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the HF model, in the order of its layers."""
    return dict(_hf_shapes(architecture))


def _hf_shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, head = architecture.hidden_size, architecture.moe_intermediate_size, architecture.head_dim
    query, key = architecture.num_attention_heads * head, architecture.num_key_value_heads * head
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (architecture.num_experts, hidden),
    }
    expert = {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }
    yield EMBEDDING, (architecture.vocab_size, hidden)
    for number in range(architecture.num_hidden_layers):
        prefix = f"model.layers.{number}."
        yield from ((prefix + name, shape) for name, shape in layer.items())
        for index in range(architecture.num_experts):
            yield from ((f"{prefix}mlp.experts.{index}.{name}", shape) for name, shape in expert.items())
    yield "model.norm.weight", (hidden,)
    if not architecture.tie_word_embeddings:
        yield LM_HEAD, (architecture.vocab_size, hidden)
