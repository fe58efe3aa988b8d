"""Small Qwen3 MoE models for tests: ours in any layout, and transformers' own as the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.forward import run
from gspo_moe.model.inputs import ModelInput
from gspo_moe.model.weights import TensorSource, load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from tests.launch import renew_port

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "rope_theta": 10_000.0,
}  # fmt: skip


def architecture(**changes: Any) -> Architecture:
    return Architecture(**{**SIZES, **changes})


def layout(world_size: int = 1, **parallel: int) -> Layout:
    """The layout of `world_size` ranks with these keys of the config's `parallel` section."""
    tensor, pipeline, expert, context = (parallel.get(name, 1) for name in ("tensor", "pipeline", "expert", "context"))
    expert_tensor = parallel.get("expert_tensor", tensor)
    return Layout(
        data=world_size // (tensor * pipeline * context),
        expert_data=world_size // (pipeline * expert * expert_tensor),
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=parallel.get("virtual_pipeline"),
        expert=expert,
        expert_tensor=expert_tensor,
        context=context,
        sequence_parallel=tensor > 1,
    )


@contextlib.contextmanager
def built(
    architecture: Architecture, layout: Layout, source: TensorSource | None = None, config: Config | None = None
) -> Iterator[Model]:
    """A model in its process groups, which go down at the end; filled from `source` where one is given."""
    groups = initialize(layout, seed=1)
    try:
        model = build_model(config or Config(), architecture, groups)
        if source is not None:
            load_weights(model, source)
        yield model
        renew_port()
    finally:
        shut_down()


class Tensors:
    """A TensorSource of tensors at hand."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __str__(self) -> str:
        return "tensors"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def reference_model(architecture: Architecture, seed: int = 0) -> Any:
    """transformers' model with random weights, norms included, large enough for logits far from zero."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**architecture.to_hf())).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


def reference_logits(model: Any, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [n, vocabulary] of each sequence, run by itself."""
    with torch.no_grad():
        return [model(input_ids=sequence[None]).logits[0] for sequence in sequences]


def random_sequences(architecture: Architecture, lengths: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(architecture.vocab_size, (length,), generator=generator) for length in lengths]


def packed(sequences: Sequence[torch.Tensor], **more: Any) -> ModelInput:
    """The sequences end to end, positions from 0 in each."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return ModelInput(torch.cat(list(sequences)), positions, cu_seqlens, **more)


def forward_logits(model: Model, packs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Logits [n, vocabulary] of each sequence of each pack; empty but on the last pipeline stage."""
    inputs = [packed(sequences) for sequences in packs]
    outputs = run(model, inputs, lambda _, stage: (None, stage.logits()), backward=False)
    return [
        list(whole_vocabulary(model, logits_TV).split([len(sequence) for sequence in sequences]))
        for logits_TV, sequences in zip(outputs, packs, strict=False)
    ]


def logits_at(
    model: Model, packs: Sequence[Sequence[torch.Tensor]], positions: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits [N, vocabulary] at these positions of each pack; empty but on the last pipeline stage."""
    chosen = [torch.tensor(one, dtype=torch.int64) for one in positions]
    inputs = [packed(sequences) for sequences in packs]
    outputs = run(model, inputs, lambda index, stage: (None, stage.logits(chosen[index])), backward=False)
    return [whole_vocabulary(model, logits_NV) for logits_NV in outputs]


def cached_logits(
    model: Model, sequences: Sequence[torch.Tensor], prompt_lengths: Sequence[int]
) -> list[list[torch.Tensor]]:
    """Logits at each position, the prompts' from one prefill and the others' one token at a time from the cache.

    Sequences leave when they end; halfway to the end of the longest continuation the cache's rows change places.
    Empty lists but on the last pipeline stage.
    """
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    # The last row takes the padding of sequence parallelism.
    cache = KVCache(rows=len(sequences) + 1, capacity=max(map(len, sequences)))
    row_of = list(range(len(sequences)))

    def forward(item: ModelInput, owners: Sequence[int]) -> None:
        for logits_TV in run(model, [item], lambda _, stage: (None, stage.logits()), backward=False):
            for owner, logits_V in zip(owners, whole_vocabulary(model, logits_TV), strict=True):
                found[owner].append(logits_V)

    owners = [number for number, length in enumerate(prompt_lengths) for _ in range(length)]
    prompts = [sequence[:length] for sequence, length in zip(sequences, prompt_lengths, strict=True)]
    forward(packed(prompts, cache=cache, rows_T=torch.tensor(owners)), owners)
    steps = max(len(sequence) - length for sequence, length in zip(sequences, prompt_lengths, strict=True))
    for step in range(steps):
        if step == steps // 2:
            cache.select(torch.tensor([*reversed(range(len(sequences))), len(sequences)]))
            row_of.reverse()
        place = {n: length + step for n, length in enumerate(prompt_lengths) if length + step < len(sequences[n])}
        rows = [row_of[number] for number in place]
        item = ModelInput(
            torch.stack([sequences[number][position] for number, position in place.items()]),
            torch.tensor(list(place.values())),
            torch.arange(len(place) + 1),
            cache=cache,
            rows_T=torch.tensor(rows),
            used=max(place.values()) + 1,
            rows_in_order=rows == list(range(len(rows))),
        )
        forward(item, list(place))
    return found


def whole_vocabulary(model: Model, logits_TV: torch.Tensor) -> torch.Tensor:
    """Every tensor rank's columns side by side, without the padding."""
    columns = [torch.empty_like(logits_TV) for _ in range(model.groups.tensor.size())]
    dist.all_gather(columns, logits_TV.contiguous(), group=model.groups.tensor)
    return torch.cat(columns, dim=1)[:, : model.architecture.vocab_size]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read without the project's code."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in found, f"{name} is in two files"
            found[name] = tensor
    return found
