from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.evaluation.evaluate import check_held_out, evaluate, evaluation_metrics, held_out_prompts, sampling
from gspo_moe.types import Prompt
from tests.rollouts import rewarded


def test_accuracy_counts_full_rewards_and_reward_is_the_mean() -> None:
    groups = (
        rewarded("eval/0", (1.0, 0.5), (3, 5), (True, False)),
        rewarded("eval/1", (0.0, 1.0), (4, 4), (True, True)),
        rewarded("eval/2", (1.5, -1.0), (1, 1), (True, True)),
    )
    assert evaluation_metrics(groups) == pytest.approx(
        {
            "eval/accuracy": 3 / 6,
            "eval/reward": 3 / 6,
            "eval/response_length": 18 / 6,
            "eval/truncated": 1 / 6,
        }
    )


def test_held_out_prompts_are_the_first_of_their_split() -> None:
    prompts = SimpleNamespace(prompt=lambda split, index: Prompt(f"{split}/{index}", "?", "t"))
    task: Any = SimpleNamespace(prompts=prompts)
    config = Config.model_validate({"evaluation": {"prompts": 3}})
    assert [prompt.uid for prompt in held_out_prompts(config, task)] == ["eval/0", "eval/1", "eval/2"]


def test_more_held_out_prompts_than_there_are_are_refused() -> None:
    task: Any = SimpleNamespace(name="few", prompts=SimpleNamespace(size=lambda split: {"eval": 2}[split]))
    check_held_out(Config.model_validate({"evaluation": {"prompts": 2}}), task)
    with pytest.raises(ConfigError, match=r"evaluation\.prompts=3 exceeds the 2 .*task\.name=few; set it to at most 2"):
        check_held_out(Config.model_validate({"evaluation": {"prompts": 3}}), task)


def test_a_task_that_holds_nothing_out_is_refused() -> None:
    task: Any = SimpleNamespace(name="data", prompts=SimpleNamespace(size=lambda split: 0))
    for wanted in (3, "all"):
        with pytest.raises(ConfigError, match=rf"evaluation\.prompts={wanted}: task\.name=data has no held-out"):
            check_held_out(Config.model_validate({"evaluation": {"prompts": wanted}}), task)
    check_held_out(Config.model_validate({"evaluation": {"prompts": 0}}), task)


def test_evaluation_has_its_own_sampling() -> None:
    own = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_response_tokens": 40}
    params = sampling(Config.model_validate({"evaluation": own}), frozenset({7}))
    assert {key: getattr(params, key) for key in own} == own


def test_every_evaluation_of_a_run_draws_the_same_numbers_untruncated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def generate(prompts: Any, samples: int, params: Any, *, ahead: bool) -> str:
        asked.append((samples, params))
        return "share"

    answered = [rewarded("eval/0", (1.0, 0.0), (1, 1), (True, True))]
    groups = SimpleNamespace(data_context=None)
    answerer: Any = SimpleNamespace(generate=generate, reward=lambda share: answered, groups=groups)
    monkeypatch.setattr("gspo_moe.evaluation.evaluate.gather_objects", lambda value, group: [value])
    config = Config.model_validate(
        {
            "seed": 5,
            "evaluation": {"samples": 2, "temperature": 0.25},
            "rollout": {"top_p": 0.5, "top_k": 3, "temperature": 2.0, "max_response_tokens": 9},
        }
    )
    for _ in range(2):
        assert evaluate(config, answerer, [], frozenset({7})) == answered
    (samples, params), (_, again) = asked
    assert samples == 2
    assert params == again
    assert (params.temperature, params.top_p, params.top_k) == (0.25, 1.0, 0)
    assert (params.max_response_tokens, params.stop_ids) == (9, {7})
