"""Layouts accepted and refused; each row was worked out by hand from megatron-core's two grids."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from gspo_moe.config import ConfigError, check_layout, load_config

# tiny: 4 layers, 4 heads, 2 KV heads, 16 experts of width 32; 32 prompts of 8 samples in 4 mini-batches.


def _check(world: int, parallel: str = "", *more: str, version: str = "0.16.1") -> tuple:
    config = load_config(None, ["model=tiny", f"parallel={{{parallel}}}", *more])
    architecture = config.model.architecture(vocab_size=64)
    return astuple(check_layout(config, architecture, world, version))


@pytest.mark.parametrize(
    ("world", "parallel", "expected"),
    [
        # expected: data, expert_data, tensor, pipeline, virtual, expert, expert_tensor, context, sequence_parallel
        (1, "", (1, 1, 1, 1, None, 1, 1, 1, False)),
        (2, "expert: 2", (2, 1, 1, 1, None, 2, 1, 1, False)),
        (2, "tensor: 2", (1, 1, 2, 1, None, 1, 2, 1, True)),
        (4, "tensor: 2, expert: 2", (2, 1, 2, 1, None, 2, 2, 1, True)),
        (2, "tensor: 2, expert: 2, expert_tensor: 1", (1, 1, 2, 1, None, 2, 1, 1, True)),
        (8, "tensor: 2, pipeline: 2, expert: 2, expert_tensor: 1", (2, 2, 2, 2, None, 2, 1, 1, True)),
        (4, "pipeline: 2, virtual_pipeline: 2", (2, 2, 1, 2, 2, 1, 1, 1, False)),
        (16, "expert: 16", (16, 1, 1, 1, None, 16, 1, 1, False)),
        (2, "context: 2", (1, 2, 1, 1, None, 1, 1, 2, False)),
        (8, "tensor: 2, context: 2, expert: 4, expert_tensor: 1", (2, 2, 2, 1, None, 4, 1, 2, True)),
    ],
)
def test_layouts_that_fit(world: int, parallel: str, expected: tuple) -> None:
    assert _check(world, parallel) == expected


@pytest.mark.parametrize(
    ("world", "parallel", "more", "parts"),
    [
        (3, "tensor: 2", (), ("parallel.tensor=2", "3 processes", "multiple of 2")),
        (1, "expert: 2", (), ("parallel.expert=2", "1 processes", "multiple of 2")),
        (2, "tensor: 2, expert: 2", (), ("parallel.expert=2", "parallel.expert_tensor=2", "= 4", "multiple of 4")),
        (4, "tensor: 4", (), ("parallel.tensor=4", "num_key_value_heads=2", "1 or 2")),
        (3, "tensor: 3", (), ("parallel.tensor=3", "num_attention_heads=4", "1 or 2")),
        (3, "expert: 3", (), ("parallel.expert=3", "num_experts=16", "1 or 2")),
        (3, "pipeline: 3", (), ("parallel.pipeline=3", "num_hidden_layers=4", "1 or 2")),
        (2, "pipeline: 2, virtual_pipeline: 4", (), ("parallel.virtual_pipeline=4", "8 unequal", "1 or 2 or 4")),
        (1, "virtual_pipeline: 2", (), ("parallel.virtual_pipeline=2", "parallel.pipeline > 1", "null")),
        (3, "context: 2", (), ("parallel.context=2", "3 processes", "multiple of 2")),
        (3, "", (), ("rollout.prompts_per_step=32", "3 data-parallel", "rollout.prompts_per_step=33")),
        (3, "", ("stage=sft",), ("schedule.sft_batch=64", "3 data-parallel", "schedule.sft_batch=66")),
        (
            16,
            "",
            ("rollout.prompts_per_step=16", "rollout.samples_per_prompt=2", "algorithm.mini_batches=16"),
            ("algorithm.mini_batches=16", "leaves 2", "16 data-parallel", "lower algorithm.mini_batches"),
        ),
        (32, "expert: 2, expert_tensor: 16", ("model.overrides.moe_intermediate_size=24",), ("=24", "1 or 2 or 3 or")),
    ],
)
def test_layouts_that_do_not_fit(world: int, parallel: str, more: tuple[str, ...], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(world, parallel, *more)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "parallel",
    [
        "tensor: 2, expert: 1, expert_tensor: 1",
        "tensor: 1, expert: 1, expert_tensor: 2",
    ],
)
def test_silently_wrong_expert_gradients_are_refused_where_megatron_has_them(parallel: str) -> None:
    tensor = parallel[len("tensor: ")]
    for version in ("0.16.1", "0.17.0", "0.18.2"):
        with pytest.raises(ConfigError, match="wrong expert gradients") as caught:
            _check(2, parallel, version=version)
        assert f"parallel.expert_tensor={tensor}" in str(caught.value)
        assert version in str(caught.value)
    assert _check(2, parallel, version="0.19.2")[2] == int(tensor)


def test_one_sequence_a_rank_and_mini_batch_is_enough() -> None:
    sizes = ("rollout.prompts_per_step=16", "rollout.samples_per_prompt=2", "algorithm.mini_batches=2")
    assert _check(16, "", *sizes)[0] == 16


def test_supervised_training_does_not_need_the_rollout_sizes() -> None:
    assert _check(64, "", "stage=sft", "rollout.prompts_per_step=4")[0] == 64


def test_all_violations_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        _check(5, "tensor: 3, context: 2, expert: 5, virtual_pipeline: 2")
    lines = str(caught.value).splitlines()
    keys = ("divide the 5 processes", "num_attention_heads", "num_experts=16", "virtual_pipeline", "context=2 = 6")
    for key in keys:
        assert any(key in line for line in lines)


@pytest.mark.parametrize(
    ("world", "parallel", "nearest"),
    [
        (4, "tensor: 4", "parallel.tensor=2; or parallel.tensor=2 parallel.expert=2"),
        (
            2,
            "tensor: 2, expert_tensor: 1",
            "parallel.tensor=1; or parallel.expert_tensor=2; or parallel.expert=2",
        ),
        (8, "pipeline: 8, virtual_pipeline: 2", "parallel.pipeline=2; or"),
    ],
)
def test_the_nearest_layouts_that_work_are_named(world: int, parallel: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(world, parallel)
    last = str(caught.value).splitlines()[-1]
    assert last.startswith(f"nearest layouts that work with {world} processes: {nearest}")
    for named in last.partition(": ")[2].split("; or "):
        changes = dict(item.removeprefix("parallel.").split("=") for item in named.split())
        given = dict(item.split(": ") for item in parallel.split(", ")) | changes
        assert _check(world, ", ".join(f"{key}: {value}" for key, value in given.items()))


def test_no_layout_is_named_where_none_works() -> None:
    with pytest.raises(ConfigError) as caught:
        _check(3, "tensor: 3")
    assert "nearest layouts" not in str(caught.value)


def test_large_presets_fit_their_published_layouts() -> None:
    for preset, world, parallel in (
        ("qwen3_30b_a3b", 32, "tensor: 4, expert: 8, expert_tensor: 1"),
        ("qwen3_235b_a22b", 128, "tensor: 4, pipeline: 2, expert: 16, expert_tensor: 1"),
        ("qwen3_coder_480b_a35b", 256, "tensor: 8, pipeline: 2, expert: 32, expert_tensor: 1"),
    ):
        config = load_config(None, [f"model={preset}", f"parallel={{{parallel}}}", "rollout.prompts_per_step=64"])
        layout = check_layout(config, config.model.architecture(), world, "0.16.1")
        assert layout.data * layout.tensor * layout.pipeline == world
        assert layout.expert_data * layout.expert * layout.pipeline == world
