"""The rollouts that a step learns from, and their advantages: sampling, rewards, shaping, dynamic sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from gspo_moe.algorithms import degenerate_groups, group_advantages
from gspo_moe.algorithms.overlong import overlong_penalty
from gspo_moe.errors import RewardError
from gspo_moe.rollout.answers import all_rollouts
from gspo_moe.rollout.queue import lags
from gspo_moe.tasks.rewards import part_means
from gspo_moe.training.batch import Batch
from gspo_moe.training.session import Trainer
from gspo_moe.types import Rollout, RolloutGroup, TrainingSample


def collect(trainer: Trainer) -> Batch:
    """Gets the step's groups from the rollout source. Collective.

    With dynamic sampling (2503.14476, equation 11) batches of prompts are drawn until enough groups have rewards that
    differ, at most `algorithm.sampling_rounds` of them; if they do not suffice, groups of equal rewards fill the rest.
    Raises RewardError where no group's rewards differ at all, and where too many rewards failed.
    """
    config = trainer.session.config
    count, came = config.rollout.prompts_per_step, list[RolloutGroup]()
    for _ in range(config.algorithm.sampling_rounds if config.algorithm.samples_dynamically else 1):
        came += trainer.queue.draw(trainer.progress.step, trainer.progress.policy_version)
        trainer.session.reward_errors.check(came[-count:], f"step {trainer.progress.step + 1}")
        if sum(map(_differs, came)) >= count:
            break
    kept = chosen(came, count)
    if config.algorithm.samples_dynamically and not any(map(_differs, kept)):
        raise RewardError(
            f"the answers to each of {len(came)} prompts all have the same reward, so that there is nothing to "
            "learn; take easier or harder prompts (task.options), train the model on demonstrations first (stage=sft), "
            "raise rollout.samples_per_prompt or rollout.temperature, or set algorithm.dynamic_sampling=false"
        )
    samples, penalty = _samples(trainer, kept)
    return Batch(
        groups=tuple(kept),
        samples=tuple(samples),
        prompts=tuple(group.prompt for group in came),
        metrics=_metrics(came, kept) | penalty | _lag_metrics(trainer, kept) | trainer.queue.figures(),
    )


def _differs(group: RolloutGroup) -> bool:
    return len(set(group.rewards)) > 1


def chosen(came: Sequence[RolloutGroup], count: int) -> list[RolloutGroup]:
    """The first `count` groups whose rewards differ, in order; where they are too few, others in between fill up."""
    spare = max(count - sum(map(_differs, came)), 0)
    kept: list[RolloutGroup] = []
    for each in came:
        if _differs(each):
            kept.append(each)
        elif spare:
            kept.append(each)
            spare -= 1
    return kept[:count]


def _samples(trainer: Trainer, groups: Sequence[RolloutGroup]) -> tuple[list[TrainingSample], dict[str, float]]:
    """The groups' rollouts with advantages of their rewards, these with the over-long penalty, and its mean."""
    config, rollouts = trainer.session.config, all_rollouts(groups)
    limit, figures = config.rollout.max_response_tokens, dict[str, float]()
    rewards = _rewards(groups)
    buffer = config.algorithm.overlong_tokens(limit)
    if buffer:
        penalty = overlong_penalty(torch.tensor([one.longest_turn for one in rollouts]), limit, buffer)
        rewards = rewards + penalty
        figures["reward/overlong_penalty"] = penalty.mean().item()
    size = config.rollout.samples_per_prompt
    if not config.has_value_head and size > 1:
        trainer.session.no_learning.step(len(groups), degenerate_groups(rewards, size), rewards.mean().item())
    advantages = torch.zeros_like(rewards)  # a value function makes its own, of tokens
    if not config.has_value_head:
        scale = config.algorithm.spec.advantages == "group"
        advantages = group_advantages(rewards, size, scale=scale)
    shaped = zip(rollouts, rewards.tolist(), advantages.tolist(), strict=True)
    keeps = bool(config.rollout.max_staleness)
    return [_sample(rollout, reward, advantage, keeps) for rollout, reward, advantage in shaped], figures


def _sample(rollout: Rollout, reward: float, advantage: float, keeps_versions: bool) -> TrainingSample:
    return TrainingSample(
        token_ids=rollout.token_ids,
        response_mask=rollout.policy_mask,
        advantage=advantage,
        rollout_log_probs=rollout.log_probs,
        routes=rollout.routes,
        reward=reward,
        versions=rollout.versions if keeps_versions else (),
    )


def _rewards(groups: Sequence[RolloutGroup]) -> torch.Tensor:
    return torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)


def _lag_metrics(trainer: Trainer, groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """How old the tokens are that the step learns from; empty where they are of the step's own policy."""
    config = trainer.session.config
    limit, found = config.rollout.max_staleness, Counter[int]()
    if not limit:
        return {}
    for lag, tokens in lags(groups, trainer.progress.policy_version, config.algorithm.mini_batches):
        found[lag] += tokens
    assert max(found) <= limit, f"tokens of lags {sorted(found)} beyond rollout.max_staleness={limit}"
    share = {lag: found[lag] / found.total() for lag in range(limit + 1)}
    return {
        "lag/mean": sum(lag * part for lag, part in share.items()),
        "lag/max": max(found),
        "lag/tokens": 1.0 - share[0],
        **{f"lag/tokens/lag_{lag}": part for lag, part in share.items()},
    }


def _lengths(rollouts: Sequence[Rollout]) -> torch.Tensor:
    return torch.tensor([len(rollout.log_probs) for rollout in rollouts], dtype=torch.float64)


def _metrics(drawn: Sequence[RolloutGroup], kept: Sequence[RolloutGroup]) -> dict[str, float]:
    rollouts = all_rollouts(drawn)
    rewards, lengths, size = _rewards(drawn), _lengths(rollouts), len(drawn[0].rollouts)
    given = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward/failures": sum(reward.error is not None and not reward.timed_out for reward in given),
        "reward/timeouts": sum(reward.timed_out for reward in given),
        "reward/failure_rate": sum(reward.error is not None for reward in given) / len(rollouts),
        **{f"reward/parts/{name}": value for name, value in part_means(given).items()},
        "groups/count": len(kept),
        "groups/drawn": len(drawn),
        "groups/degenerate": degenerate_groups(rewards, size) if size > 1 else 0,
        "response/length_mean": lengths.mean().item(),
        "response/length_max": lengths.max().item(),
        "response/truncated": sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts),
        "rollout/tokens": lengths.sum().item(),
        "throughput/tokens": sum(len(rollout.token_ids) for rollout in all_rollouts(kept)),
    }
