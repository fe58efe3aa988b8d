from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from gspo_moe.config import ConfigError, load_config
from tests.losses import CLIPS


@pytest.mark.parametrize(
    ("name", "clips"),
    [
        ("gspo", (3e-4, 4e-4)),
        ("gspo_token", (3e-4, 4e-4)),
        ("grpo", (0.2, 0.27)),
        ("dr_grpo", (0.2, 0.2)),
        ("dapo", (0.2, 0.28)),
        ("cispo", (1.0, 4.0)),
        ("gmpo", (1 - math.exp(-0.4), math.exp(0.4) - 1)),
    ],
)
def test_clips_default_to_each_papers_own(name: str, clips: tuple[float, float]) -> None:
    assert load_config(None, [f"algorithm.name={name}"]).algorithm.clips == clips


@pytest.mark.parametrize("clip", ["clip_low", "clip_high"])
@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_wide_clips_of_a_sequence_ratio_need_consent(name: str, clip: str) -> None:
    wide = [f"algorithm.name={name}", f"algorithm.{clip}=0.01"]
    with pytest.raises(ConfigError, match="allow_wide_clip=true"):
        load_config(None, wide)
    assert 0.01 in load_config(None, [*wide, "algorithm.allow_wide_clip=true"]).algorithm.clips
    assert load_config(None, [f"algorithm.name={name}", f"algorithm.{clip}=0.0099"]).algorithm.name == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=grpo", "clip_low=3e-4", "clip_high=4e-4"], "made for a sequence ratio"),
        (["name=gmpo", "clip_low=1.0"], "clip_low below 1 (the default is 0.33 and 0.492)"),
        (["name=cispo", "clip_low=1.5"], "at most 1, which is no lower bound"),
        (["name=rspo", "old_log_probs=rollout"], "set it to trainer or use algorithm.name=gmpo"),
        (["name=ppo", "old_log_probs=rollout"], "takes the old policy's values in its forward pass"),
        (["name=ppo", "dynamic_sampling=true"], "has as much to learn; leave it out"),
        (["ppo.lam=0.9"], "set algorithm.name=ppo or leave algorithm.ppo out"),
        (["name=ppo", "ppo.gamma=1.5"], "algorithm.ppo.gamma=1.5"),
        (["name=ppo", "options.gamma=1.5"], "algorithm.options.gamma=1.5"),
        (["name=ppo", "options.gama=1"], "the nearest valid key is algorithm.options.gamma"),
        (["options.gamma=1"], "algorithm.name=gspo has no options; leave algorithm.options out"),
        (["name=ppo", "ppo.lam=0.9", "options.lam=0.8"], "algorithm.options.lam=0.8 are one key; keep the second"),
        (["mismatch.correction=tis"], "no place for token weights"),
        (["name=grpo", "mismatch.correction=tis", "old_log_probs=rollout"], "count the engine's log-probs twice"),
        (["name=vespo", "mismatch.correction=tis"], "leave it out and set algorithm.old_log_probs=rollout"),
        (["mismatch={correction: tis, level: sequence}"], "set algorithm.mismatch.high a little above"),
        (["mismatch={correction: tis, low: 0.5}"], "tis has no lower bound"),
        (["mismatch={correction: mask, low: 1.5}"], "set low below 1 and high above 1"),
        (["mismatch.high=3.0"], "set algorithm.mismatch.correction to tis or mask"),
        (["kl.reference=model"], "raise coeff"),
        (["overlong_buffer=40"], "exceeds rollout.max_response_tokens=32"),
    ],
)
def test_what_makes_no_sense_for_an_algorithm_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [f"algorithm.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["rollout.prompts_per_step=10", "rollout.samples_per_prompt=1", "algorithm.overlong_buffer=40"],
            ["rollout.prompts_per_step=10", "rollout.samples_per_prompt=1", "algorithm.overlong_buffer=40"],
        ),
        (
            ["stage=sft", "routing={replay: r2, attribution: true}", "algorithm.mini_batches=1"],
            ["routing.replay=r2, routing.attribution=true", "routing.attribution=true with"],
        ),
        (
            ["routing={record: false, engine_routes: true, probe_interval: 3}", "optimizer.min_lr=1"],
            ["optimizer.min_lr=1 exceeds", "routing.engine_routes=true", "routing.probe_interval=3"],
        ),
        (
            ["checkpoint={keep_every: 6, interval: 4}"],
            ["checkpoint.keep_every=6 is no multiple of checkpoint.interval=4: checkpoints that are not written"],
        ),
        (["checkpoint={keep_every: 6, interval: 3, keep: 0}"], ["checkpoint.keep_every=6 with checkpoint.keep=0"]),
        (
            ["model={preset: tiny, overrides: {num_key_value_heads: 3, head_dim: 5}}", "schedule.steps=0"],
            ["model.overrides: num_attention_heads=4", "model.overrides: head_dim=5", "schedule.steps=0"],
        ),
        (
            ["algorithm={name: gmpo, clip_low: 1.5, old_log_probs: rollout, mismatch: {correction: tis}}"],
            ["algorithm.clip_low=1.5", "algorithm.mismatch.correction=tis with", "algorithm.name=gmpo has one term"],
        ),
        (
            ["model={hf: there, preset: tiny, checkpoint: here, random_init: true}"],
            ["model.preset='tiny' and model.hf='there' and", "model.random_init=true"],
        ),
    ],
)
def test_all_faults_are_told_at_once(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    lines = str(error.value).splitlines()
    assert len(lines) == len(named)
    for line, start in zip(lines, named, strict=True):
        assert line.startswith(start)


def test_rspo_needs_the_recorder() -> None:
    with pytest.raises(ConfigError, match=r"set routing\.record=true"):
        load_config(None, ["algorithm.name=rspo", "routing.record=false"])
    assert load_config(None, ["stage=sft", "algorithm.name=rspo", "routing.record=false"]).stage == "sft"


def test_a_backend_is_one_name_or_one_by_part() -> None:
    def backend(value: str) -> dict[str, str]:
        return dict(load_config(None, ["model.preset=tiny", f"model.backend={value}"]).model.backend)

    parts = ("experts", "attention", "norms", "optimizer")
    assert backend("auto") == backend("{}") == dict.fromkeys(parts, "auto")
    assert backend("local") == {**dict.fromkeys(parts, "local"), "optimizer": "auto"}
    assert backend("{experts: local, optimizer: transformer_engine}") == {
        "experts": "local",
        "attention": "auto",
        "norms": "auto",
        "optimizer": "transformer_engine",
    }
    for value, message in (
        ("apex", "model.backend='apex': expected auto, local, transformer_engine, or such a name by part: experts, "),
        ("true", "model.backend=True: "),
        ("{experts: apex}", "model.backend.experts='apex': expected 'auto', 'local' or 'transformer_engine'"),
        ("{norm: local}", "unknown key model.backend.norm='local'; the nearest valid key is model.backend.norms"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            backend(value)


def test_ppo_needs_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.samples_per_prompt=1: algorithm\.name=gspo compares"):
        load_config(None, ["rollout.samples_per_prompt=1"])
    assert load_config(None, ["rollout.samples_per_prompt=1", "algorithm.name=ppo"]).has_value_head


def test_the_configurations_in_the_docs_are_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        (tmp_path / "config.yaml").write_text(block)
        load_config(tmp_path / "config.yaml")


def test_the_docs_name_each_algorithm_with_its_default_clips() -> None:
    page = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name, (low, high) in CLIPS.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        clips = row.rstrip(" |").rpartition("|")[2].strip()
        if name not in ("gmpo", "rspo"):
            assert [float(clip) for clip in clips.split(" / ")] == [low, high]


def test_dynamic_sampling_needs_answers_that_differ() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.top_k=0"):
        load_config(None, ["algorithm.name=dapo", "rollout.top_k=1"])
    assert not load_config(None, ["algorithm.name=dapo", "algorithm.dynamic_sampling=false"]).algorithm.dynamic_sampling


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ("{correction: tis}", (0.0, 2.0)),
        ("{correction: mask}", (0.5, 5.0)),
        ("{correction: mask, level: sequence, low: 0.99, high: 1.01}", (0.99, 1.01)),
    ],
)
def test_bounds_of_mismatch_weights(given: str, bounds: tuple[float, float]) -> None:
    assert load_config(None, ["algorithm.name=grpo", f"algorithm.mismatch={given}"]).algorithm.mismatch.bounds == bounds


def test_overlong_buffer_is_dapos_own() -> None:
    assert [load_config(None, [f"algorithm.name={n}"]).algorithm.overlong_tokens(20480) for n in ("dapo", "grpo")] == [
        4096,
        0,
    ]


def test_mini_batches_need_not_divide_for_supervised_training() -> None:
    overrides = ["rollout.prompts_per_step=10"]
    with pytest.raises(ConfigError, match=r"algorithm\.mini_batches=4"):
        load_config(None, overrides)
    assert load_config(None, [*overrides, "stage=sft"]).rollout.prompts_per_step == 10


def test_expert_tensor_follows_tensor_unless_set() -> None:
    assert load_config(None, ["parallel.tensor=2"]).parallel.expert_tensor_size == 2
    assert load_config(None, ["parallel={tensor: 2, expert_tensor: 1}"]).parallel.expert_tensor_size == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["routing.replay=r2", "routing.record=false"], r"routing\.replay=r2 needs the recorder"),
        (["routing.probe_interval=3", "routing.record=false"], r"routing\.probe_interval=3 needs the recorder"),
        (["routing.attribution=true", "routing.record=false"], r"routing\.attribution=true needs the recorder"),
        (["routing.engine_routes=true", "routing.record=false"], r"routing\.engine_routes=true needs the recorder"),
        (["routing.attribution=true", "algorithm.mini_batches=1"], r"algorithm\.mini_batches to 2 or more"),
        (["routing.replay=r3", "stage=sft"], "stage=sft has no rollouts"),
        (["routing.replay=r4"], r"routing\.replay"),
        (
            ["routing.replay=predict", "algorithm.mini_batches=1"],
            r"nothing to foretell.*set algorithm\.mini_batches to 2",
        ),
        (
            ["routing.replay=predict", "algorithm.mini_batches=2", "parallel.dispatcher=allgather"],
            r"pads a pack to the longest of its pass.*set parallel\.dispatcher=alltoall",
        ),
        (
            ["routing={replay: predict, replay_margin: 0.1}", "algorithm.mini_batches=2"],
            r"routing\.replay=predict does not replay; set replay=r2 or recall",
        ),
        (["routing.replay=recall"], r"routing\.replay=recall holds the gate weights.*set routing\.frozen_router=true"),
        (
            ["routing={replay: recall, frozen_router: true, record: false}"],
            r"routing\.replay=recall needs the recorder",
        ),
        (["routing={replay: r3, replay_margin: 0.1}"], r"routing\.replay_margin=0\.1 chooses by .*=r3 does not replay"),
    ],
)
def test_routing_options_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_r3_needs_the_engines_routes_and_not_the_recorder() -> None:
    assert load_config(None, ["routing.replay=r3", "routing.record=false"]).routing.reports_engine_routes
    assert not load_config(None, ["routing.replay=r2"]).routing.reports_engine_routes
