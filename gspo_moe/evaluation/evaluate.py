"""Accuracy on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.evaluation.estimates import CORRECT, correct_answers, pass_at, pass_at_name
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.rollout.answers import Answerer, all_rollouts
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Prompt, RolloutGroup


def held_out_prompts(config: Config, task: Task) -> list[Prompt]:
    """The task's first held-out prompts; make them once, some tasks take long."""
    wanted = config.evaluation.prompts
    count = task.prompts.size("eval") if wanted == "all" else wanted
    assert count is not None, "check_held_out lets no such config pass"
    return [task.prompts.prompt("eval", index) for index in range(count)]


def check_held_out(config: Config, task: Task) -> None:
    """Raises ConfigError where the task has fewer held-out prompts than the config wants."""
    size, wanted = task.prompts.size("eval"), config.evaluation.prompts
    if size == 0 and wanted:
        raise ConfigError(
            f"evaluation.prompts={wanted}: task.name={task.name} has no held-out prompts; name a file of some "
            "(task.data.eval), take some out of training's (task.data.held_out), or set evaluation.prompts=0"
        )
    if wanted == "all":
        if size is None:
            raise ConfigError(
                f"evaluation.prompts=all: task.name={task.name} has held-out prompts without end; set a number"
            )
    elif size is not None and wanted > size:
        raise ConfigError(
            f"evaluation.prompts={wanted} exceeds the {size} held-out prompts of task.name={task.name}; set it to at "
            f"most {size}, or to all"
        )


def evaluate(
    config: Config, answerer: Answerer, prompts: Sequence[Prompt], stop_ids: frozenset[int]
) -> list[RolloutGroup]:
    """Every rank's answers to held-out prompts, with the same randomness at every call. Collective."""
    params = sampling(config, stop_ids)
    share = answerer.reward(answerer.generate(prompts, config.evaluation.samples, params, ahead=True))
    return [group for part in gather_objects(share, answerer.groups.data_context) for group in part]


def sampling(config: Config, stop_ids: frozenset[int]) -> SamplingParams:
    """How held-out answers are sampled."""
    chosen = config.evaluation
    return SamplingParams(
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        max_response_tokens=config.answer_limit("eval")[0],
        stop_ids=stop_ids,
        seed=f"{config.seed}/eval",
    )


def evaluation_metrics(groups: Sequence[RolloutGroup], ks: Sequence[int] = ()) -> dict[str, float]:
    """`eval/accuracy` is avg@k: the mean over prompts of the share of a prompt's answers whose reward is 1 or more.

    ks: of each `eval/pass_at/{k}`.
    """
    rollouts = all_rollouts(groups)
    rewards = [rollout.total_reward for rollout in rollouts]
    counts = [(len(group.rollouts), correct_answers(group)) for group in groups]
    return {
        "eval/accuracy": sum(reward >= CORRECT for reward in rewards) / len(rewards),
        "eval/reward": sum(rewards) / len(rewards),
        "eval/response_length": sum(len(rollout.log_probs) for rollout in rollouts) / len(rollouts),
        "eval/truncated": sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts),
        **{pass_at_name(k): sum(pass_at(k, *count) for count in counts) / len(counts) for k in ks},
    }
