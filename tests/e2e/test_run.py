"""What a run leaves behind, and that a run goes on where it was stopped."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from gspo_moe.cli import USER_ERROR, main
from gspo_moe.config.lease import LOCK_FILE, hold
from gspo_moe.config.loading import load_config
from gspo_moe.data.tokenizers import SentencePieceTokenizer
from gspo_moe.observability import load_run
from tests.e2e.conftest import FinishedRun
from tests.e2e.program import SMALL_RL, Program, gspo_moe, json_lines, metrics_by_step, succeed, torchrun

RUNS = ("one_process", "quickstart")
LAST = 8
NO_ROUTING = "routing.engine_routes=false routing.probe_interval=0 routing.attribution=false"
ROUTING = ("slot_change", "flip_rate", "any_layer_flip", "flipped_layers_per_token")


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> FinishedRun:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, FinishedRun)
    return found


@pytest.fixture
def copy(one_process: FinishedRun, tmp_path: Path) -> Path:
    """Of the working folder of the run of one process, to be written in."""
    return shutil.copytree(one_process.path.parent, tmp_path / "copy")


def test_the_run_folder_holds_the_resolved_config(run: FinishedRun) -> None:
    saved = load_config(run.path / "config.yaml")
    given = ["logging.run_dir=" + saved.logging.run_dir, f"model.hf={saved.model.hf}", *SMALL_RL]
    expert = 2 if run.path.parent.name.startswith("quickstart") else 1
    start = ["model.preset=null", "optimizer.warmup_updates=5"] if expert == 2 else ["model.preset=null"]
    assert saved == load_config(None, [*start, *given, f"parallel.expert={expert}"])


def test_every_step_is_measured(run: FinishedRun) -> None:
    steps = metrics_by_step(run.path)
    assert sorted(steps) == list(range(LAST + 1))
    assert [step for step in steps if "eval/accuracy" in steps[step]] == [0, 2, 4, 6, 8]
    for step in range(1, LAST + 1):
        assert 0.0 <= steps[step]["reward/mean"] <= 1.0
        assert steps[step]["policy_version"] == 2 * step
        assert None not in steps[step].values()
    assert max(steps[step]["reward/std"] for step in range(1, LAST + 1)) > 0


def test_the_first_mini_batch_sees_the_old_policy_and_the_second_does_not(run: FinishedRun) -> None:
    steps = metrics_by_step(run.path)
    for step in range(1, LAST + 1):
        for name in ROUTING:
            first = steps[step][f"routing/staleness/{name}/mini_batch_1"]
            second = steps[step][f"routing/staleness/{name}/mini_batch_2"]
            assert first == 0.0
            # Both mini-batches have about as many response tokens, and the step's figure is over all of them.
            assert min(first, second) <= steps[step][f"routing/staleness/{name}"] <= max(first, second)
        layers = [steps[step][f"routing/staleness/slot_change/layer_{layer:02d}"] for layer in range(2)]
        assert sum(layers) / 2 == pytest.approx(steps[step]["routing/staleness/slot_change"], abs=1e-12)
        assert steps[step]["ratio/token_min"] < 1.0 < steps[step]["ratio/token_max"]
        assert steps[step]["mismatch/k3"] < 1e-8
    assert max(steps[step]["routing/staleness/slot_change"] for step in steps if step) > 0
    for level in ("sequence", "token"):
        fractions = [steps[step][f"clip_fraction/{level}"] for step in range(1, LAST + 1)]
        # Only the second half of a step can be clipped.
        assert 0 < max(fractions) < 0.75


def test_expert_load_is_logged_by_layer(run: FinishedRun) -> None:
    steps = metrics_by_step(run.path)
    for step in range(1, LAST + 1):
        for name, most in (("max_violation", 7.0), ("cv", math.sqrt(7.0)), ("entropy", math.log(8))):
            layers = [steps[step][f"routing/load/{name}/layer_{layer:02d}"] for layer in range(2)]
            assert 0 < min(layers) <= max(layers) < most
            assert sum(layers) / 2 == pytest.approx(steps[step][f"routing/load/{name}"], abs=1e-12)


def test_every_pair_is_measured_with_its_floor_and_by_layer(run: FinishedRun) -> None:
    found = load_run(run.path)
    for pair, interval in (("staleness", 1), ("engine", 1), ("update", 2)):
        every = list(range(interval, LAST + 1, interval))
        for name in ("slot_change", "flip_rate", "response_set_change", "noise_floor/slot_change"):
            metric = f"routing/{pair}/{name}"
            steps, values = found.layers[metric]
            assert steps.tolist() == found.steps(metric).tolist() == every
            np.testing.assert_allclose(values.mean(axis=1), found.values(metric), atol=1e-6)
        for name in ("any_layer_flip", "flipped_layers_per_token"):
            assert (found.values(f"routing/{pair}/{name}") >= found.values(f"routing/{pair}/flip_rate")).all()
    assert (found.values("routing/update/noise_floor/slot_change") == 0).all()
    assert (found.values("routing/update/router_shift") < 1).all()  # scores move long before a route does
    assert max(found.values("routing/engine/slot_change")) < 0.01
    assert len((run.path / "probe.jsonl").read_text().splitlines()) == 8
    rollout, trained = (found.layers[f"routing/load/{kind}tokens"][1].sum(axis=2) for kind in ("rollout/", ""))
    np.testing.assert_array_equal(rollout, trained)


def test_log_ratios_are_split_with_intervals(run: FinishedRun) -> None:
    found = load_run(run.path)
    assert (found.values("routing/attribution/sequences") == 12).all()
    for name in ("phi_token", "phi_sequence", "washout"):
        assert found.layers[f"routing/attribution/{name}"][1].shape == (LAST, 2)
        if (
            name == "washout" and f"routing/attribution/{name}" not in found.names
        ):  # no route moved, nothing to wash out
            continue
        value, low, high = (found.values(f"routing/attribution/{name}{suffix}") for suffix in ("", "_low", "_high"))
        assert len(value) == LAST or name == "washout"
        assert ((low <= value) & (value <= high)).mean() > 0.7


def test_tensorboard_shows_the_same_figures(run: FinishedRun) -> None:
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    steps = metrics_by_step(run.path)
    for name in ("reward/mean", "eval/accuracy", "routing/staleness/slot_change/mini_batch_2"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({step: steps[step][name] for step in steps if name in steps[step]})


def test_samples_can_be_read_and_checked(run: FinishedRun) -> None:
    samples = json_lines(run.path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in range(1, LAST + 1) for _ in range(4)]
    for sample in samples:
        answer = "".join(sorted(sample["prompt"].removesuffix(">")))
        assert sample["reward"] == float(sample["response"] == answer)
        assert math.isfinite(sample["advantage"])


def test_checkpoints_picture_and_table(run: FinishedRun) -> None:
    checkpoints = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert checkpoints == ["step_00000006", "step_00000008"]
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps = metrics_by_step(run.path)
    rows = [line.split() for line in run.outcome.stdout.splitlines() if line.startswith("held-out accuracy")]
    before, after = (f"{steps[step]['eval/accuracy']:.1%}" for step in (0, LAST))
    assert rows[-1][2:4] == [before, after]


def test_the_console_shows_progress_and_nothing_of_the_libraries(run: FinishedRun) -> None:
    lines = run.outcome.stderr.splitlines()
    header = ("run ", "model ", "device ", "layout ", "kernels ", "versions ")
    stages = 1 + (run.path / "cold_start").is_dir()
    assert [line.split()[0] + " " for line in lines if line.startswith(header)] == list(header) * stages
    assert [line for line in lines if not line.startswith(("step ", "install: ", "prompt ", "| ", *header))] == []
    assert lines[-1].startswith(f"step {LAST}/{LAST}")


def test_transformers_loads_the_export(run: FinishedRun) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.path / "hf")
    tokenizer = SentencePieceTokenizer.load(run.path / "hf" / "tokenizer.model")
    assert model.config.eos_token_id == tokenizer.eos_id
    start = load_config(run.path / "config.yaml").model.hf
    assert start is not None
    before = AutoModelForCausalLM.from_pretrained(run.path.parent / start)
    changed = [not torch.equal(old, new) for old, new in zip(before.parameters(), model.parameters(), strict=True)]
    assert all(changed)


def test_eval_of_the_export_gives_the_last_held_out_accuracy(one_process: FinishedRun) -> None:
    folder = one_process.path.parent
    command = gspo_moe("eval", "run/config.yaml", "--output", "answers.jsonl", "model.hf=run/hf")
    outcome = succeed(command, folder)
    last = metrics_by_step(one_process.path)[LAST]
    names = ("eval/accuracy", "eval/reward", "eval/response_length", "eval/truncated")
    found, intervals = zip(*(line.split(" [") for line in outcome.stdout.splitlines()[:2]), strict=True)
    lines = [*found, *outcome.stdout.splitlines()[2:]]
    assert lines == [f"{name} {last[name]:.6g}" for name in names]
    for name, interval in zip(names, intervals, strict=False):
        low, high = map(float, interval.removesuffix("]").split(", "))
        assert low < last[name] < high
    answers = json_lines(folder / "answers.jsonl")
    assert [one["uid"] for one in answers] == [f"eval/{index}" for index in range(32)]
    rewards = [answer["reward"] for one in answers for answer in one["answers"]]
    assert sum(reward >= 1 for reward in rewards) / len(rewards) == last["eval/accuracy"]
    written = (folder / "answers.jsonl").read_bytes()
    refused = Program(command, folder).finish()
    assert refused.code == USER_ERROR
    assert "answers.jsonl exists; name another file, or replace it with --overwrite" in refused.stderr
    split = [*command[1:], "--overwrite", "parallel.expert=2"]
    assert succeed(torchrun(2, "-m", "gspo_moe", *split), folder).stdout == outcome.stdout
    assert (folder / "answers.jsonl").read_bytes() == written


def test_a_finished_run_says_so_and_stays_as_it_is(copy: Path, one_process: FinishedRun) -> None:
    before = (copy / "run" / "metrics.jsonl").read_bytes()
    outcome = succeed(one_process.command, copy)
    first, *table = outcome.stdout.splitlines()
    assert "run has finished its 8 steps before" in first
    assert "logging.run_dir" in first
    assert table == one_process.outcome.stdout.splitlines()
    assert (copy / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("other", ["seed=7", f"stage=sft {NO_ROUTING}", "task.options.min_length=5", "model.hf=other"])
def test_a_run_folder_of_another_run_is_refused(
    other: str,
    copy: Path,
    one_process: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (copy / "other").symlink_to(copy / "run" / "hf")
    before = (copy / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(copy)
    assert main([*map(str, one_process.command[1:]), *other.split()]) == USER_ERROR
    key, *_ = other.split("=")
    assert f"logging.run_dir=run holds another run ({key} was" in capsys.readouterr().err
    assert (copy / "run" / "metrics.jsonl").read_bytes() == before


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(one_process: FinishedRun, tmp_path: Path) -> None:
    shutil.copytree(one_process.path.parent / "model", tmp_path / "model")
    shutil.copy(one_process.path.parent / "config.yaml", tmp_path)
    hold(tmp_path / "run", "logging.run_dir")
    outcome = Program(one_process.command, tmp_path).finish()
    assert (outcome.code, outcome.stdout, outcome.left_behind) == (USER_ERROR, "", ())
    assert f"ConfigError: logging.run_dir=run is in use by process {os.getpid()} on" in outcome.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_a_killed_run_goes_on_as_if_it_had_not_been(quickstart: FinishedRun, tmp_path: Path) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    shutil.copytree(quickstart.path / "cold_start", run / "cold_start")
    killed = Program(quickstart.command, tmp_path, RUN_DIR=str(run))
    metrics = run / "metrics.jsonl"
    killed.wait_for(lambda: metrics.exists() and '"step": 4' in metrics.read_text())
    killed.kill()
    assert [path.name for path in checkpoints.glob("step_*") if path.suffix != ".partial"] == ["step_00000003"]
    # As a kill in the middle of writing leaves it.
    partial = checkpoints / "step_00000006.partial"
    partial.mkdir(exist_ok=True)
    (partial / "__0_0.distcp").write_bytes(b"torn")
    with metrics.open("a") as file:
        file.write('{"step": 5, "reward/me')

    outcome = succeed(quickstart.command, tmp_path, RUN_DIR=str(run))
    assert "cold start" not in outcome.stdout
    continuing, *lines = outcome.stderr.splitlines()
    assert any(line.startswith("run ") and f"{run}, steps 4 to 8 of gspo" in line for line in lines)
    assert continuing == f"continuing from step 3 of {run}"
    assert next(line for line in lines if line.startswith("step ")).startswith("step 4/8")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000006", "step_00000008"]
    assert metrics_by_step(run) == metrics_by_step(quickstart.path)
    assert json_lines(run / "samples.jsonl") == json_lines(quickstart.path / "samples.jsonl")
    weights = Path("hf") / "model.safetensors"
    assert (run / weights).read_bytes() == (quickstart.path / weights).read_bytes()
