"""Which parallel sizes fit the model, the batch and the machine; checked before any process group starts. Torch-free.

Two grids share the world: tensor * context * pipeline * data for dense layers, and
expert_tensor * expert * pipeline * expert_data for experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import log2, prod

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError

FIXES_EXPERT_GRADIENTS = (0, 19)
MOST_NEAREST = 3


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups.

    data, expert_data: replicas of a dense layer and of an expert (context parallelism not counted in `data`).
    virtual_pipeline: model chunks a pipeline rank, None without interleaving.
    sequence_parallel: activations between tensor-parallel regions are split along the sequence.
    """

    data: int
    expert_data: int
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    expert: int
    expert_tensor: int
    context: int
    sequence_parallel: bool


def check_layout(
    config: Config,
    architecture: Architecture,
    world_size: int,
    megatron_version: str,
) -> Layout:
    """The layout of `world_size` processes.

    Raises ConfigError with one line, naming key, value and fix, for each thing that cannot work or that this
    megatron-core is known to compute wrongly without a word, and a last line with the nearest layouts that work.
    """
    found = _misfits(config, architecture, world_size, megatron_version)
    if found:
        nearest = _nearest(config, architecture, world_size, megatron_version)
        if nearest:
            found.append(f"nearest layouts that work with {world_size} processes: {'; or '.join(nearest)}")
        raise ConfigError("\n".join(found))
    parallel = config.parallel
    return Layout(
        data=world_size // (parallel.tensor * parallel.pipeline * parallel.context),
        expert_data=world_size // (parallel.pipeline * parallel.expert * parallel.expert_tensor_size),
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor_size,
        context=parallel.context,
        sequence_parallel=parallel.tensor > 1,
    )


def _misfits(config: Config, architecture: Architecture, world_size: int, megatron_version: str) -> list[str]:
    found = [
        *_world(config, world_size),
        *_model(config, architecture),
        *_engine(config, megatron_version),
    ]
    parallel = config.parallel
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    return [*found, *_batches(config, data)] if data else found


def _nearest(config: Config, architecture: Architecture, world_size: int, megatron_version: str) -> list[str]:
    """Up to three layouts of these processes that fit, as what to set; those whose sizes change least come first."""
    parallel = config.parallel
    wanted = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "expert": parallel.expert,
        "expert_tensor": parallel.expert_tensor_size,
        "context": parallel.context,
    }
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    choices = [divisors] * 4 + [sorted({1, parallel.context})]
    ranked = []
    for sizes, virtual in product(product(*choices), sorted({None, parallel.virtual_pipeline}, key=str)):
        found: dict[str, int | None] = {**dict(zip(wanted, sizes, strict=True)), "virtual_pipeline": virtual}
        if parallel.expert_tensor is None and found["expert_tensor"] == found["tensor"]:
            found["expert_tensor"] = None
        changed = {key: value for key, value in found.items() if value != getattr(parallel, key)}
        steps = sum(abs(log2(size / before)) for size, before in zip(sizes, wanted.values(), strict=True))
        ranked.append((steps + ("virtual_pipeline" in changed), len(changed), sizes, changed))
    fitting = []
    for *_, changed in sorted(ranked, key=lambda entry: entry[:3]):
        new = config.model_copy(update={"parallel": parallel.model_copy(update=changed)})
        if not _misfits(new, architecture, world_size, megatron_version):
            fitting.append(" ".join(f"parallel.{key}={_yaml(value)}" for key, value in changed.items()))
        if len(fitting) == MOST_NEAREST:
            break
    return fitting


def _yaml(value: int | None) -> str:
    return "null" if value is None else str(value)


def _world(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    grids = (
        {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context},
        {"pipeline": parallel.pipeline, "expert": parallel.expert, "expert_tensor": parallel.expert_tensor_size},
    )
    for sizes in grids:
        needed = prod(sizes.values())
        if world_size % needed:
            named = " * ".join(f"parallel.{name}={size}" for name, size in sizes.items())
            yield (
                f"{named} = {needed} does not divide the {world_size} processes of this run; "
                f"start a multiple of {needed} (torchrun --nproc-per-node) or lower one of them"
            )


def _model(config: Config, architecture: Architecture) -> Iterator[str]:
    parallel = config.parallel
    for key, size, name, whole in (
        ("tensor", parallel.tensor, "num_attention_heads", architecture.num_attention_heads),
        ("tensor", parallel.tensor, "num_key_value_heads", architecture.num_key_value_heads),
        ("expert", parallel.expert, "num_experts", architecture.num_experts),
        ("expert_tensor", parallel.expert_tensor_size, "moe_intermediate_size", architecture.moe_intermediate_size),
    ):
        if whole % size:
            yield (
                f"parallel.{key}={size} does not divide the model's {name}={whole}; "
                f"set parallel.{key} to {_divisors_up_to(size, whole)}"
            )
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    layers = architecture.num_hidden_layers
    if parallel.virtual_pipeline and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1; "
            "set parallel.virtual_pipeline to null or parallel.pipeline to 2"
        )
    elif layers % chunks:
        yield (
            f"parallel.pipeline={parallel.pipeline} with parallel.virtual_pipeline={parallel.virtual_pipeline} cuts "
            f"the model's num_hidden_layers={layers} into {chunks} unequal chunks; "
            f"make their product {_divisors_up_to(chunks, layers)}"
        )


def _engine(config: Config, megatron_version: str) -> Iterator[str]:
    parallel = config.parallel
    tensor, expert_tensor = parallel.tensor, parallel.expert_tensor_size
    version = tuple(int(part) for part in megatron_version.split(".")[:2])
    # megatron-core < 0.19 reduces such experts over the dense data-parallel group, which is not the group that shares
    # them (`allreduce` in tensor_parallel/layers.py).
    if parallel.expert == 1 and expert_tensor != tensor and version < FIXES_EXPERT_GRADIENTS:
        yield (
            f"parallel.tensor={tensor} with parallel.expert=1 and parallel.expert_tensor={expert_tensor} gives wrong "
            f"expert gradients without a word in megatron-core {megatron_version}; "
            f"set parallel.expert_tensor={tensor}{f' or parallel.expert={tensor}' if tensor > 1 else ''}"
        )


def _batches(config: Config, data: int) -> Iterator[str]:
    if config.stage == "sft":
        if config.schedule.sft_batch % data:
            yield _unequal("schedule.sft_batch", config.schedule.sft_batch, data)
        return
    rollout, mini_batches = config.rollout, config.algorithm.mini_batches
    if rollout.prompts_per_step % data:
        yield _unequal("rollout.prompts_per_step", rollout.prompts_per_step, data)
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt // mini_batches
    if sequences < data:
        yield (
            f"algorithm.mini_batches={mini_batches} leaves {sequences} of rollout.prompts_per_step="
            f"{rollout.prompts_per_step} * rollout.samples_per_prompt={rollout.samples_per_prompt} sequences to each, "
            f"fewer than the {data} data-parallel ranks; lower algorithm.mini_batches or sample more"
        )


def _unequal(key: str, value: int, data: int) -> str:
    return (
        f"{key}={value} does not divide into the {data} data-parallel ranks evenly; "
        f"set {key}={(value // data + 1) * data} or start another number of processes"
    )


def _divisors_up_to(limit: int, whole: int) -> str:
    fits = [str(size) for size in range(1, min(limit, whole) + 1) if whole % size == 0]
    return " or ".join(fits)
