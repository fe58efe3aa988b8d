"""Skipped mini-batches of runs with a planted fault, computed again alone from what the run kept of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gspo_moe.cli import main
from gspo_moe.parallel.groups import shut_down
from gspo_moe.replay.dump import read_dumps
from gspo_moe.replay.replay import replay
from gspo_moe.training import loop, rl
from gspo_moe.training.batch import Batch
from gspo_moe.training.session import Trainer
from gspo_moe.training.sft import sft_step
from tests.unit.training.test_rl import SMALL
from tests.unit.training.test_saving import QUIET

STEP = (*SMALL, *QUIET, "evaluation.prompts=0", "schedule.steps=1", "algorithm.mini_batches=2")
Plant = Callable[[Trainer, Batch], Batch]
learn = rl.learn


@pytest.fixture
def skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    def run(plant: Plant, *overrides: str) -> list[Path]:
        """The dumps of one step, of whose batch or weights `plant` makes something else."""
        monkeypatch.setattr(rl, "learn", lambda trainer, batch: learn(trainer, plant(trainer, batch)))
        config = tmp_path / "config.yaml"
        config.write_text("seed: 1\n")
        assert main(["train", str(config), *STEP, f"logging.run_dir={tmp_path / 'run'}", *overrides]) in (0, 5)
        monkeypatch.undo()
        return sorted((tmp_path / "run" / "skipped").glob("step_*.safetensors"))

    return run


def differing(batch: Batch) -> Batch:
    """With advantages: all answers of these random weights earn the same."""
    samples = [dataclasses.replace(one, advantage=0.1 * (-1) ** i) for i, one in enumerate(batch.samples)]
    return dataclasses.replace(batch, samples=tuple(samples))


def loud(trainer: Trainer, batch: Batch) -> Batch:
    """One answer's advantage is near float32's largest number."""
    samples = list(differing(batch).samples)
    samples[5] = dataclasses.replace(samples[5], advantage=3e38)
    return dataclasses.replace(batch, samples=tuple(samples))


def broken_weight(trainer: Trainer, batch: Batch) -> Batch:
    with torch.no_grad():
        trainer.session.model.gpt_chunks[0].decoder.final_layernorm.weight[3] = float("inf")
    return differing(batch)


def test_a_broken_weight_is_named_with_all_that_follows_from_it(
    skipped: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    dumps = skipped(broken_weight)
    assert [file.name for file in dumps] == [f"step_00000001_mini_batch_{k}_rank_00000.safetensors" for k in (1, 2)]
    assert [path.name for path in dumps[0].parent.glob("weights_*")] == ["weights_step_00000001_mini_batch_1"]
    capsys.readouterr()
    assert main(["replay", str(dumps[1])]) == 0
    told = capsys.readouterr().out
    assert told.startswith("step 1, mini-batch 2: 8 sequences, ")
    assert re.search(r"^loss +nan +nan$", told, re.MULTILINE)
    assert re.search(r"^gradient norm +nan +nan$", told, re.MULTILINE)
    assert "not finite: 1 of 21 weights, 8 of 8 sequences, " in told
    assert "  weight decoder.final_layernorm.weight[3] = inf\n" in told
    assert re.search(
        r"  sequence of sample \d+: mean log-ratio nan, loss nan; first at token \d+ .*: log-prob nan$",
        told,
        re.MULTILINE,
    )
    assert told.endswith("reproduced\n")


@pytest.mark.parametrize(
    "routes",
    [
        ("r2",),
        ("recall", "routing.frozen_router=true", "routing.replay_margin=0.02"),
        pytest.param(("predict",), marks=pytest.mark.slow),
    ],
)
def test_an_answer_whose_gradient_overflows_is_named(
    skipped: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str], routes: tuple[str, ...]
) -> None:
    """With what its loss needs of the old policy: replayed routes and gate weights, and a reference."""
    replay, *more = routes
    dumps = skipped(loud, f"routing.replay={replay}", *more, "algorithm.kl.coeff=0.1")
    (file,) = [one for one in dumps if any(5 in group for group in samples_of(one))]
    capsys.readouterr()
    assert main(["replay", str(file)]) == 0
    told = capsys.readouterr().out
    for name in ("loss", "gradient norm"):
        run, here = re.findall(rf"^{name} +(\S+) +(\S+)$", told, re.MULTILINE)[0]
        assert run == here
    assert "not finite: 0 of 21 weights, 0 of 8 sequences, " in told
    assert "\nlargest loss: sequence of sample 5: mean log-ratio " in told
    assert told.endswith("reproduced\n")


def test_a_log_prob_of_the_engine_that_breaks_a_ratio_is_named(
    skipped: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    where = []

    def impossible(trainer: Trainer, batch: Batch) -> Batch:
        """To the engine the first token of answer 5 was all but impossible, and it is a bad answer."""
        samples, one = list(batch.samples), batch.samples[5]
        log_probs = (-1000.0, *one.rollout_log_probs[1:])
        samples[5] = dataclasses.replace(one, advantage=-1.0, rollout_log_probs=log_probs)
        position = one.response_mask.index(1)
        where.append((position, one.token_ids[position]))
        return dataclasses.replace(batch, samples=tuple(samples))

    (file,) = skipped(impossible, "algorithm.old_log_probs=rollout", "routing.record=false")
    capsys.readouterr()
    assert main(["replay", str(file)]) == 0
    told = capsys.readouterr().out
    ((position, token),) = where
    assert "not finite: 0 of 21 weights, 1 of 8 sequences, " in told
    assert f"loss inf; first at token {position} (id {token}): ratio inf\n" in told


def test_a_value_function_whose_loss_overflows_is_named(
    skipped: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    def earning(trainer: Trainer, batch: Batch) -> Batch:
        """One answer earns what no float32 holds the square of."""
        samples = list(batch.samples)
        samples[5] = dataclasses.replace(samples[5], reward=1e25)
        return dataclasses.replace(batch, samples=tuple(samples))

    dumps = skipped(earning, "algorithm={name: ppo, mini_batches: 2}")
    (file,) = [one for one in dumps if any(5 in group for group in samples_of(one))]
    assert "pack_0/estimates/values_T" in read_dumps(file)[0].tensors
    capsys.readouterr()
    assert main(["replay", str(file)]) == 0
    told = capsys.readouterr().out
    run, here = re.findall(r"^loss +(\S+) +(\S+)$", told, re.MULTILINE)[0]
    assert run == here
    assert "not finite: 0 of 22 weights, 1 of 8 sequences, " in told
    assert re.search(r"^  sequence of sample 5: mean log-ratio \S+, loss inf$", told, re.MULTILINE)
    assert told.endswith("reproduced\n")


@pytest.mark.parametrize("breaks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_demonstrations_are_replayed_too(
    breaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a broken weight, and of an update that data and weights did not break."""

    def broken_step(trainer: Trainer) -> dict[str, float]:
        if breaks:
            with torch.no_grad():
                trainer.session.model.gpt_chunks[0].decoder.final_layernorm.weight[3] = float("inf")
        else:
            monkeypatch.setattr(trainer.optimizer.megatron, "get_grad_norm", lambda: float("inf"))
        return sft_step(trainer)

    monkeypatch.setattr(loop, "sft_step", broken_step)
    config = tmp_path / "config.yaml"
    config.write_text("stage: sft\n")
    run = [*STEP, "schedule.sft_batch=8", "schedule.micro_batch_tokens=64", f"logging.run_dir={tmp_path / 'run'}"]
    assert main(["train", str(config), *run]) == (5 if breaks else 0)
    monkeypatch.undo()
    (file,) = (tmp_path / "run" / "skipped").glob("step_*.safetensors")
    capsys.readouterr()
    assert main(["replay", str(file)]) == (0 if breaks else 8)
    told = capsys.readouterr().out
    run_loss, here = re.findall(r"^loss +(\S+) +(\S+)$", told, re.MULTILINE)[0]
    assert run_loss == here
    assert f"not finite: {int(breaks)} of 21 weights, {8 * breaks} of 8 sequences, " in told
    if breaks:
        assert re.search(r"  sequence of sample 0: loss nan; first at token \d+ \(id \d+\): log-prob nan$", told, re.M)
    else:
        shares = [one.loss for one in replay(file).sequences]
        assert sum(shares) == pytest.approx(float(here), rel=1e-6)
        shut_down()


def samples_of(file: Path) -> list[list[int]]:
    return read_dumps(file)[0].described.samples


def test_what_the_weights_and_the_data_did_not_break_is_not_reproduced(
    skipped: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_device(trainer: Trainer, batch: Batch) -> Batch:
        monkeypatch.setattr(trainer.optimizer.megatron, "get_grad_norm", lambda: float("inf"))
        return differing(batch)

    dumps = skipped(failing_device)
    capsys.readouterr()
    assert main(["replay", str(dumps[0])]) == 8
    told = capsys.readouterr()
    assert "not finite: 0 of 21 weights, 0 of 8 sequences, 0 of 21 gradients\n" in told.out
    assert told.out.endswith("not reproduced\n")
    assert told.err.startswith("gspo-moe: NotReproduced: the mini-batch computed here is not what the run found")
    # The loss is the run's to the last digit, as is each sequence's share of it.
    loss, here = re.findall(r"^loss +(\S+) +(\S+)$", told.out, re.MULTILINE)[0]
    assert loss == here


def test_dumps_that_cannot_be_replayed_say_why(
    skipped: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, _), checkpoints = skipped(broken_weight), tmp_path / "run" / "checkpoints"
    capsys.readouterr()
    for weights in first.parent.glob("weights_*"):
        weights.rename(tmp_path / "elsewhere")
    assert main(["replay", str(first)]) == 2
    assert "weights_step_00000001_mini_batch_1" in capsys.readouterr().err
    assert main(["replay", str(first), "--weights", str(tmp_path / "elsewhere")]) == 0
    assert main(["replay", str(tmp_path / "none.safetensors")]) == 2
    assert "does not exist; give a file step_" in capsys.readouterr().err
    assert not checkpoints.exists()
    first.write_bytes(first.read_bytes()[:100])
    assert main(["replay", str(first)]) == 2
    assert "is no dump that can be replayed" in capsys.readouterr().err
