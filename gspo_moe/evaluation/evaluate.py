"""Accuracy on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.rollout.answers import Answerer, Answers
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Prompt

CORRECT = 1.0


def held_out_prompts(config: Config, task: Task) -> list[Prompt]:
    """The task's first held-out prompts; make them once, some tasks take long."""
    return [task.prompts.prompt("eval", index) for index in range(config.evaluation.prompts)]


def check_held_out(config: Config, task: Task) -> None:
    """Raises ConfigError where the task has fewer held-out prompts than the config wants."""
    size = task.prompts.size("eval")
    if size is not None and config.evaluation.prompts > size:
        raise ConfigError(
            f"evaluation.prompts={config.evaluation.prompts} exceeds the {size} held-out prompts of task.name="
            f"{task.name}; set it to at most {size}"
        )


def evaluate(
    config: Config, answerer: Answerer, prompts: Sequence[Prompt], stop_ids: frozenset[int], policy_version: int
) -> Answers:
    """Answers held-out prompts, with the same randomness at every call. Collective."""
    params = SamplingParams(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        top_k=0,
        max_response_tokens=config.rollout.max_response_tokens,
        stop_ids=stop_ids,
        seed=f"{config.seed}/eval",
    )
    return answerer.rewards(answerer.generate(prompts, config.evaluation.samples, params, policy_version))


def evaluation_metrics(answers: Answers) -> dict[str, float]:
    """`eval/accuracy` is avg@k: the mean over prompts of the share of a prompt's answers whose reward is 1 or more."""
    rewards = [reward for group in answers.groups for reward in group.rewards]
    rollouts = [rollout for group in answers.groups for rollout in group.group.rollouts]
    return {
        "eval/accuracy": sum(reward >= CORRECT for reward in rewards) / len(rewards),
        "eval/reward": sum(rewards) / len(rewards),
        "eval/response_length": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "eval/truncated": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
    }
