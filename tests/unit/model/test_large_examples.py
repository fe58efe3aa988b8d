"""The examples for clusters of GPUs: every rank's shard, built without memory on the meta device.

One process plays each rank in turn, in a fake process group of the whole cluster. Ranks at the same place of both
grids (dense layers' and experts') hold the same shard, which is built once.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gspo_moe.config import Config, Layout, check_layout, load_config
from gspo_moe.model import build, experts
from gspo_moe.model.build import build_model
from gspo_moe.model.names import Entry, hf_shapes
from gspo_moe.model.weights import local_tensors
from gspo_moe.parallel.groups import initialize, parallel_state, shut_down
from gspo_moe.planning.memory import estimate
from gspo_moe.platform import Device, megatron_version

EXAMPLES = Path(__file__).parents[3] / "examples"
# Bytes a parameter: bf16 weight and fp32 gradient on each rank; fp32 weight and two moments, shared by the replicas.
HELD, SHARED = 2 + 4, 4 + 4 + 4
H100_BYTES = 80e9


@pytest.fixture
def _meta_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    meta = torch.device("meta")
    new_group = dist.new_group

    def fake_group(ranks: list[int], **_: Any) -> Any:
        return new_group(ranks, backend="fake") if dist.get_rank() in ranks else dist.GroupMember.NON_GROUP_MEMBER

    monkeypatch.setattr(parallel_state.torch.distributed, "new_group", fake_group)
    monkeypatch.setattr(parallel_state.torch.cuda, "current_device", lambda: meta)
    for module in (build, experts):
        monkeypatch.setattr(module, "device", lambda: Device("cpu", meta, "gloo"))
    with meta:
        yield


def shards_of_every_rank(config: Config, layout: Layout, world_size: int) -> Iterator[dict[Entry, int]]:
    """The parameters of each rank of the cluster, with their sizes."""
    built: dict[tuple[int, ...], dict[Entry, int]] = {}
    for rank in range(world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            groups = initialize(layout, seed=1)
            within_expert = parallel_state.get_expert_tensor_parallel_group()
            place = tuple(g.rank() for g in (groups.pipeline, groups.tensor, groups.expert, within_expert))
            if place not in built:
                parameters = list(local_tensors(build_model(config, config.model.architecture(), groups)))
                assert all(local.parameter.is_meta for local in parameters)
                built[place] = {local.entry: local.of(local.parameter).numel() for local in parameters}
                assert len(built[place]) == len(parameters)
        finally:
            shut_down()
        yield built[place]


def replicas(entry: Entry, layout: Layout) -> int:
    """How many ranks are to hold the same part."""
    if ".experts." in entry.hf_names[0]:
        return layout.expert_data * (1 if entry.cut_dim is not None else layout.expert_tensor)
    return layout.data * (1 if entry.cut_dim is not None else layout.tensor)


@pytest.mark.usefixtures("_meta_device")
@pytest.mark.parametrize(
    ("name", "job", "world_size"), [("qwen3_30b_a3b", "math", 4 * 8), ("qwen3_235b_a22b", "gspo", 32 * 8)]
)
def test_the_shards_of_all_ranks_are_the_model(name: str, job: str, world_size: int) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = load_config(EXAMPLES / f"{name}_{job}.yaml", ["model.hf=null", f"model.preset={name}"])
    architecture = config.model.architecture()
    layout = check_layout(config, architecture, world_size, megatron_version())
    holders: Counter[Entry] = Counter()
    sizes: dict[Entry, int] = {}
    for shards in shards_of_every_rank(config, layout, world_size):
        holders.update(shards.keys())
        sizes |= shards
        used = sum(size * (HELD + SHARED / replicas(entry, layout)) for entry, size in shards.items())
        assert used < 0.6 * H100_BYTES, "activations, logits and the cache need the rest"
    assert holders == {entry: replicas(entry, layout) for entry in sizes}
    parts = [(hf_name, entry.index) for entry in sizes for hf_name in entry.hf_names]
    assert len(set(parts)) == len(parts)
    assert set(parts) == {(hf_name, i) for entry in sizes for hf_name in entry.hf_names for i in range(entry.count)}
    assert {hf_name for hf_name, _ in parts} == hf_shapes(architecture).keys()
    reference = Qwen3MoeForCausalLM(Qwen3MoeConfig(**architecture.to_hf()))
    assert sum(sizes.values()) == reference.num_parameters() == architecture.num_parameters


def test_the_examples_are_labelled_and_keep_the_papers_settings() -> None:
    small = []
    for file in EXAMPLES.glob("qwen3_*.yaml"):
        assert "NOT YET RUN ON GPUS" in file.read_text().splitlines()[0]
        config = load_config(file, [])
        small += [(config.model, config.parallel)] if "30b" in file.name else []
        assert (config.algorithm.name, config.algorithm.clips) == ("gspo", (3e-4, 4e-4))
        assert config.algorithm.mini_batches == 4
        world_size, preset = (256, "qwen3_235b_a22b") if "235b" in file.name else (32, "qwen3_30b_a3b")
        architecture = load_config(file, ["model.hf=null", f"model.preset={preset}"]).model.architecture()
        layout = check_layout(config, architecture, world_size, megatron_version())
        needed = estimate(config, architecture, layout, config.rollout.max_prompt_tokens or 2048)
        assert needed.peak < 0.8 * H100_BYTES, "the CUDA context, NCCL's buffers and fragmentation need the rest"
    assert small == [small[0]] * 3
