"""pass@k and intervals, against counting every draw and the clustered standard error."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from gspo_moe.evaluation.estimates import estimates, pass_at, summary
from gspo_moe.evaluation.evaluate import evaluation_metrics
from gspo_moe.types import RolloutGroup
from tests.rollouts import rewarded


def group(number: int, rewards: list[float]) -> RolloutGroup:
    return rewarded(f"eval/{number}", rewards, [1] * len(rewards), [True] * len(rewards))


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_answer(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(combinations([True] * correct + [False] * (samples - correct), k))
            share = Fraction(sum(map(any, draws)), len(draws))
            assert pass_at(k, samples, correct) == pytest.approx(float(share), abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    chance, samples, k = 0.3, 6, 4
    mean = sum(
        math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) * pass_at(k, samples, c)
        for c in range(samples + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-15)


def test_many_answers_do_not_overflow() -> None:
    assert pass_at(512, 1024, 1) == 0.5
    assert pass_at(1000, 100_000, 10) == pytest.approx(1 - 0.99**10, abs=1e-4)


def test_intervals_are_over_prompts_not_answers() -> None:
    random = np.random.default_rng(3)
    chances = random.uniform(size=200)
    drawn = [[float(right) for right in random.random(8) < chance] for chance in chances]
    groups = [group(number, rewards) for number, rewards in enumerate(drawn)]
    found = estimates(groups, [4])
    metrics = evaluation_metrics(groups, [4])
    by_prompt = np.array([sum(rewards) / 8 for rewards in drawn])
    error = by_prompt.std(ddof=1) / math.sqrt(len(drawn))  # clustered by prompt
    for name in ("eval/accuracy", "eval/reward"):
        assert found[name].mean == pytest.approx(metrics[name])
        assert found[name].low == pytest.approx(by_prompt.mean() - 1.96 * error, abs=4e-3)
        assert found[name].high == pytest.approx(by_prompt.mean() + 1.96 * error, abs=4e-3)
    assert found["eval/pass_at/4"].mean == pytest.approx(metrics["eval/pass_at/4"])
    assert found["eval/pass_at/4"].low < metrics["eval/pass_at/4"] < found["eval/pass_at/4"].high
    assert metrics["eval/pass_at/4"] > metrics["eval/accuracy"]
    assert estimates(groups, [4]) == found
    # Copies of each prompt's first answer say no more than that answer.
    one, eight = ([group(n, rewards[:1] * count) for n, rewards in enumerate(drawn)] for count in (1, 8))
    assert estimates(eight, [])["eval/accuracy"] == estimates(one, [])["eval/accuracy"]


def lines(groups: list[RolloutGroup]) -> list[str]:
    return list(summary(groups, evaluation_metrics(groups, [1, 2]), [1, 2]))


def test_values_come_with_intervals() -> None:
    found = lines([group(0, [1.0, 0.0]), group(1, [0.0, 0.0]), group(2, [1.0, 1.0])])
    assert found == [
        "eval/accuracy 0.5 [0, 1]",
        "eval/reward 0.5 [0, 1]",
        "eval/response_length 1",
        "eval/truncated 0",
        "eval/pass_at/1 0.5 [0, 1]",
        "eval/pass_at/2 0.666667 [0, 1]",
    ]


def test_what_has_no_interval_says_why() -> None:
    *values, why = lines([group(0, [1.0, 0.0])])
    assert values[0] == "eval/accuracy 0.5"
    assert why == "one prompt: no interval, as it does not tell how others would go"
    *values, why = lines([group(number, [0.5, 0.0]) for number in range(59)])
    assert values[:2] == ["eval/accuracy 0", "eval/reward 0.25"]
    assert why.startswith("eval/accuracy, eval/reward, eval/pass_at/1, eval/pass_at/2: no interval, as all 59 prompts")
    assert "up to 5.0% of other prompts" in why  # 0.95**59 = 0.05
