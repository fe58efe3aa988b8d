"""Three steps with each algorithm, in one process, from the same weights and with the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from gspo_moe.config import load_config
from gspo_moe.data.tokenizers import SentencePieceTokenizer
from gspo_moe.parallel.groups import shut_down
from gspo_moe.tasks.pool import Item, TaskPool
from gspo_moe.tasks.protocol import last_answer
from gspo_moe.tasks.rewards import Reward
from gspo_moe.training import session
from gspo_moe.training.loop import train
from gspo_moe.training.preflight import preflight
from tests.e2e.program import metrics_by_step

STEPS = 3
SETTINGS = (
    "model=tiny",
    "model.overrides={num_hidden_layers: 2, hidden_size: 32, num_experts: 8}",
    "rollout={prompts_per_step: 4, samples_per_prompt: 4, max_response_tokens: 10}",
    "algorithm.mini_batches=2",
    f"schedule={{steps: {STEPS}, micro_batch_tokens: 96}}",
    "optimizer.lr=1e-2",
    "evaluation.prompts=0",
    "checkpoint.export_hf=false",
    "logging.progress=false",
)
ALGORITHMS = {
    "gspo": (),
    "gspo_token": (),
    "dr_grpo": (),
    "dapo": (),
    "cispo": (),
    "gmpo": (),
    "rspo": (),
    "ppo": (),
    "sapo": (),
    "dppo": (),
    "minirl": (),
    "vespo": (),
    "luspo": (),
    "gspo-kl": ("algorithm.kl={coeff: 0.04, estimator: k2}",),
    "gspo-mask": ("algorithm.mismatch={correction: mask, level: sequence, low: 0.99, high: 1.01}",),
    "grpo": (),
    "grpo-tis": ("algorithm.mismatch.correction=tis",),
    "grpo-bounded": (
        "algorithm.dual_clip=3",
        "algorithm.off_policy_mask=1e-3",
        "algorithm.kl={coeff: 0.04, estimator: k3_unbiased}",
        "algorithm.mismatch.correction=geo_mask",
    ),
    "grpo-kl": ("algorithm.kl.coeff=0.04",),
}


RESUMED = ("grpo-kl", "ppo")


class Variety(TaskPool):
    """Rewards any answer by its distinct characters, so that a model that knows nothing has something to learn."""

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        return [Reward(len(set(last_answer(turns))) / 10) for _, turns in items]


Run = dict[int, dict[str, float]]


def run(folder: Path, tokenizer: Path, *overrides: str) -> Run:
    given = (f"logging.run_dir={folder}", f"tokenizer.path={tokenizer}", *overrides)
    train(preflight(load_config(None, [*SETTINGS, *given])))
    shut_down()
    return metrics_by_step(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("algorithms")
    SentencePieceTokenizer.train(["abcdefghijklmnopqrstuvwxyz>"], 300).save(folder)
    tokenizer = folder / "tokenizer.model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "TaskPool", Variety)
        found = {
            name: run(folder / name, tokenizer, f"algorithm.name={name.partition('-')[0]}", *more)
            for name, more in ALGORITHMS.items()
        }
        for name in RESUMED:  # as after a kill behind step 2
            again = (f"algorithm.name={name.partition('-')[0]}", *ALGORITHMS[name])
            run(folder / f"{name}-resumed", tokenizer, *again, "schedule.steps=2")
            found[f"{name}-resumed"] = run(folder / f"{name}-resumed", tokenizer, *again)
        found["alone"] = run(folder / "alone", tokenizer, "algorithm.name=ppo", "rollout.samples_per_prompt=1")
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_are_measured_and_the_policy_moves(name: str, runs: dict[str, Run]) -> None:
    steps = runs[name]
    for step in range(1, STEPS + 1):
        metrics = steps[step]
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert metrics["optimizer/skipped_updates"] == 0
        assert metrics["optimizer/grad_norm"] > 0
        assert metrics["ratio/token_std"] > 0, "the second mini-batch is off-policy"
        assert metrics["groups/count"] == 4
        assert metrics["groups/drawn"] >= 4
    # What was sampled before the first update does not depend on the algorithm.
    assert steps[1]["rollout/tokens"] == runs["gspo"][1]["rollout/tokens"] or name == "dapo"


def test_each_formula_gives_a_loss_of_its_own(runs: dict[str, Run]) -> None:
    names = ("gspo", "grpo", "dr_grpo", "dapo", "cispo", "gmpo", "rspo", "ppo", "gspo-kl", "grpo-kl")
    assert len({runs[name][STEPS]["loss/policy"] for name in names}) == len(names)


def test_dapo_takes_off_for_long_answers(runs: dict[str, Run]) -> None:
    assert -1 <= runs["dapo"][1]["reward/overlong_penalty"] < 0


def test_kl_starts_at_zero_and_rises(runs: dict[str, Run]) -> None:
    for name in ("gspo-kl", "grpo-kl"):
        first, last = runs[name][1], runs[name][STEPS]
        assert 0 < first["kl/reference"] < last["kl/reference"]
        assert first["loss/kl"] == pytest.approx(0.04 * first["kl/reference"], rel=0.5)
    assert "kl/reference" not in runs["grpo"][1]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_same_reference_and_value_head(name: str, runs: dict[str, Run]) -> None:
    assert runs[f"{name}-resumed"] == runs[name]


def test_ppo_learns_values_and_needs_no_groups(runs: dict[str, Run]) -> None:
    for name in ("ppo", "alone"):
        for step in range(1, STEPS + 1):
            assert runs[name][step]["value/loss"] > 0
            assert 0 <= runs[name][step]["value/clip_fraction"] <= 1
            assert runs[name][step]["value/explained_variance"] <= 1
    assert runs["alone"][1]["groups/count"] == 4
    assert not any(key.startswith("value/") for name in ("grpo", "gspo") for key in runs[name][1])


def test_rspo_sees_the_router_move(runs: dict[str, Run]) -> None:
    for step in range(1, STEPS + 1):
        assert 0.5 < runs["rspo"][step]["router_shift/mean"] < 1
        assert runs["rspo"][step]["router_shift/mean"] == pytest.approx(
            runs["rspo"][step]["routing/staleness/router_shift"], abs=0.02
        ), "other tokens: inputs there, targets here"


def test_engine_and_trainer_agree_so_that_corrections_change_next_to_nothing(runs: dict[str, Run]) -> None:
    for name, plain in (("grpo-tis", "grpo"), ("gspo-mask", "gspo")):
        first = runs[name][1]
        assert first["mismatch/weight_mean"] == pytest.approx(1, abs=1e-4)
        assert first["mismatch/weight_cut"] == 0
        assert first["loss/policy"] == pytest.approx(runs[plain][1]["loss/policy"], abs=1e-4)
