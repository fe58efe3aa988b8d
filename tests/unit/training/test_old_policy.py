"""The old policy's pass is left out where the first mini-batch's own forward finds the same, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gspo_moe.config.loading import load_config
from gspo_moe.routing.recorder import Recording
from gspo_moe.training import learn, old_policy
from gspo_moe.training.packs import Trained, TrainingPack
from gspo_moe.training.preflight import preflight
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer
from gspo_moe.training.step import MinibatchResult
from tests.policy import trainer_of
from tools.synthetic import open_synthetic_session

SMALL = (
    "model={preset: tiny, overrides: {num_hidden_layers: 2, hidden_size: 32, num_experts: 8, initializer_range: 0.2}}",
    "rollout={prompts_per_step: 4, samples_per_prompt: 4, max_response_tokens: 8, temperature: 0.8}",
    "schedule.micro_batch_tokens=36",
    "optimizer.lr=1e-2",
    "logging.samples_per_step=0",
)
STEPS = 2


@dataclass(frozen=True)
class Outcome:
    """metrics, layers: of each step, timings left out. packs: the last step's. scored: packs that were scored."""

    metrics: list[dict[str, float]]
    layers: list[dict[str, np.ndarray]]
    packs: list[Trained]
    weights: list[torch.Tensor]
    scored: int


@contextlib.contextmanager
def opened(folder: Path, *overrides: str) -> Iterator[Trainer]:
    """On random prompts and rewards, so that there is something to learn from."""
    session = open_synthetic_session(preflight(load_config(None, [*SMALL, f"logging.run_dir={folder}", *overrides])), 5)
    with trainer_of(session) as trainer:
        yield trainer


def run(folder: Path, *overrides: str, always: bool) -> Outcome:
    """Steps on random rewards; always: every mini-batch is scored before the updates."""
    trained: list[list[Trained]] = []
    scored = 0
    with pytest.MonkeyPatch.context() as patch:
        if always:
            for module in (learn, old_policy):
                patch.setattr(module, "first_scored", lambda config: 0)

        def keep(trainer: Trainer, results: Sequence[MinibatchResult]) -> dict[str, float]:
            trained.append([one for result in results for one in result.packs])
            return mismatch_metrics(trainer, results)

        def count(trainer: Trainer, packs: Sequence[TrainingPack]) -> list[TrainingPack]:
            nonlocal scored
            scored += len(packs)
            return score(trainer, packs)

        mismatch_metrics, score = learn._mismatch_metrics, old_policy._scored
        patch.setattr(learn, "_mismatch_metrics", keep)
        patch.setattr(old_policy, "_scored", count)
        with opened(folder, *overrides) as trainer:
            results = [rl_step(trainer) for _ in range(STEPS)]
            chunks = trainer.session.model.chunks
            weights = [one.detach().clone() for chunk in chunks for one in chunk.parameters()]
    metrics = [
        {k: v for k, v in one.metrics.items() if not k.startswith(("timing/", "throughput/"))} for one in results
    ]
    return Outcome(metrics, [one.layers for one in results], trained[-1], weights, scored)


def compare(found: Outcome, expected: Outcome) -> None:
    assert [alike(one) for one in found.metrics] == [alike(one) for one in expected.metrics]
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(values, theirs[name], equal_nan=True) for name, values in ours.items())
    assert all(map(torch.equal, found.weights, expected.weights))
    for one, other in zip(found.packs, expected.packs, strict=True):
        assert_equal([one.log_probs_T, *of(one.recording)], [other.log_probs_T, *of(other.recording)])
        old, expected_old = one.pack, other.pack
        assert_equal(
            [old.old_log_probs_T, *of(old.recording)], [expected_old.old_log_probs_T, *of(expected_old.recording)]
        )


def alike(metrics: dict[str, float]) -> dict[str, float]:
    """Without what tells apart whether the first mini-batch's own forward, which replays nothing, was another one."""
    return {name: value for name, value in metrics.items() if not name.startswith("routing/replay/")}


def of(recording: Recording | None) -> list[torch.Tensor | None]:
    """All that is recorded; the order of a token's experts has no meaning."""
    if recording is None:
        return [None]
    own, reference = recording.own, recording.reference_log_probs_TLK
    scores = [None, None] if own is None else [own.margin_TL, own.log_probs_TLK.sort(-1).values]
    return [recording.routes_TLK.sort(-1).values, *scores, None if reference is None else reference.sort(-1).values]


def assert_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


RECORDS = "routing.record=true"
WITHOUT = "routing.record=false"


@pytest.mark.parametrize(
    ("overrides", "mini_batches", "scored"),
    [
        (["algorithm.name=gspo", RECORDS, "routing.engine_routes=true"], 1, 0),
        (["algorithm.name=gspo", RECORDS, "routing.replay=r2"], 1, 0),
        (["algorithm.name=grpo", RECORDS, "routing.replay=r3"], 1, 0),
        (["algorithm.name=grpo", WITHOUT, "model.dtype=bf16"], 1, 0),
        (["algorithm.name=cispo", WITHOUT, "algorithm.kl.coeff=0.1"], 1, 0),
        (["algorithm.name=grpo", WITHOUT, "algorithm.mismatch={correction: tis, level: token}"], 1, 0),
        (["algorithm.name=gspo", WITHOUT, "algorithm.mismatch={correction: tis, level: sequence, high: 1.01}"], 2, 1),
        (["algorithm.name=dppo", WITHOUT, "routing.replay=r3"], 4, 3),
        (["algorithm.name=gspo", RECORDS, "routing.attribution=true"], 2, 2),
        (["algorithm.name=rspo"], 1, 1),
        (["algorithm.name=ppo"], 1, 1),
    ],
)
def test_the_first_mini_batch_is_its_own_old_policy(
    overrides: list[str], mini_batches: int, scored: int, tmp_path: Path
) -> None:
    """scored: mini-batches of a step."""
    overrides = [*overrides, f"algorithm.mini_batches={mini_batches}"]
    expected = run(tmp_path, *overrides, always=True)
    found = run(tmp_path, *overrides, always=False)
    assert found.scored * mini_batches == expected.scored * scored
    assert all(metrics["optimizer/grad_norm"] > 0 for metrics in found.metrics)
    compare(found, expected)


def test_recall_below_a_margin_covers_a_part_and_has_no_router_to_teach(tmp_path: Path) -> None:
    replay = ("routing.replay=recall", "routing.replay_margin=0.05", "routing.frozen_router=true")
    found = run(tmp_path, "algorithm.name=grpo", "algorithm.mini_batches=2", *replay, always=False)
    for metrics in found.metrics:
        assert metrics["optimizer/grad_norm"] > 0
        assert 0 < metrics["routing/replay/coverage"] < 1
        assert metrics["routing/replay/consumed"] == metrics["routing/replay/aligned"] == 1
        assert "routing/replay/router_grad_norm" not in metrics
    assert all(one.pack.gates_TLK is not None and one.pack.held_TL is not None for one in found.packs)
