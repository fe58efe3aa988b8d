"""The answers that a step learns from, and their advantages: sampling, rewards, shaping, dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gspo_moe.algorithms import degenerate_groups, group_advantages
from gspo_moe.algorithms.overlong import overlong_penalty
from gspo_moe.data.prompts import PromptSource
from gspo_moe.errors import RewardError
from gspo_moe.rollout.answers import Answers, ScoredGroup
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.training.session import Session, Trainer
from gspo_moe.types import Prompt, Rollout


@dataclass(frozen=True)
class Collected:
    """answers: those to learn from, every rank's, in the order of the prompts. advantages: one a rollout of them,
        with a value function its reward, of which `critic` makes advantages of tokens.
    metrics: of everything that was sampled. prompt_position: behind the last prompt drawn.
    """

    answers: Answers
    advantages: list[float]
    metrics: dict[str, float]
    prompt_position: int


def collect(trainer: Trainer) -> Collected:
    """Samples and scores the step's groups. Collective.

    With dynamic sampling (2503.14476, equation 11) batches of prompts are drawn until enough groups have rewards that
    differ, at most `algorithm.sampling_rounds` of them; if they do not suffice, groups of equal rewards fill the rest.
    Raises RewardError where no group's rewards differ at all.
    """
    config = trainer.session.config
    source = PromptSource(trainer.session.plan.task, "train", trainer.progress.prompt_position)
    drawn = _answer(trainer, source)
    if config.algorithm.samples_dynamically:
        rounds = 1
        while _differing(drawn) < config.rollout.prompts_per_step and rounds < config.algorithm.sampling_rounds:
            drawn = _joined(drawn, _answer(trainer, source))
            rounds += 1
    kept = replace(drawn, groups=chosen(drawn.groups, config.rollout.prompts_per_step))
    if config.algorithm.samples_dynamically and not _differing(kept):
        raise RewardError(
            f"the answers to each of {len(drawn.groups)} prompts all have the same reward, so that there is nothing to "
            "learn; take easier or harder prompts (task.options), train the model on demonstrations first (stage=sft), "
            "raise rollout.samples_per_prompt or rollout.temperature, or set algorithm.dynamic_sampling=false"
        )
    advantages, penalty = _advantages(trainer, kept)
    metrics = _metrics(drawn, kept, config.rollout.samples_per_prompt) | penalty
    return Collected(kept, advantages, metrics, source.position)


def _answer(trainer: Trainer, source: PromptSource) -> Answers:
    """Answers to the next batch of prompts, the frozen ones of `rollout.bank` where there is one."""
    session, progress = trainer.session, trainer.progress
    prompts = source.take(session.config.rollout.prompts_per_step)
    if session.bank is not None:
        return session.bank.answers(prompts)
    return sample(session, prompts, progress.step, progress.policy_version)


def sample(session: Session, prompts: Sequence[Prompt], step: int, policy_version: int) -> Answers:
    """Every rank's answers of the policy as it is, with rewards. step: steps taken so far, a seed. Collective.

    Raises RewardError where every reward failed, unless `task.reward.allow_all_failed`.
    """
    config = session.config
    params = SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_response_tokens=config.rollout.max_response_tokens,
        stop_ids=session.stop_ids,
        seed=f"{config.seed}/{step}",
        report_routes=config.routing.reports_engine_routes,
    )
    with session.timers("rollout"):
        share = session.answerer.generate(prompts, config.rollout.samples_per_prompt, params, policy_version)
    with session.timers("reward"):
        return session.answerer.score(share).check(config.task.reward.allow_all_failed)


def _joined(first: Answers, second: Answers) -> Answers:
    return Answers(
        groups=first.groups + second.groups,
        failures=first.failures + second.failures,
        timeouts=first.timeouts + second.timeouts,
        first_error=first.first_error or second.first_error,
    )


def _differs(group: ScoredGroup) -> bool:
    return len(set(group.rewards)) > 1


def _differing(answers: Answers) -> int:
    return sum(map(_differs, answers.groups))


def chosen(groups: Sequence[ScoredGroup], count: int) -> tuple[ScoredGroup, ...]:
    """The first `count` groups whose rewards differ, in order; where they are too few, others in between fill up."""
    spare = max(count - sum(map(_differs, groups)), 0)
    kept: list[ScoredGroup] = []
    for group in groups:
        if _differs(group):
            kept.append(group)
        elif spare:
            kept.append(group)
            spare -= 1
    return tuple(kept[:count])


def rollouts(answers: Answers) -> list[Rollout]:
    return [rollout for group in answers.groups for rollout in group.group.rollouts]


def _rewards(answers: Answers) -> torch.Tensor:
    return torch.tensor([reward for group in answers.groups for reward in group.rewards], dtype=torch.float64)


def _lengths(answers: Answers) -> torch.Tensor:
    return torch.tensor([len(rollout.response_ids) for rollout in rollouts(answers)], dtype=torch.float64)


def _advantages(trainer: Trainer, answers: Answers) -> tuple[list[float], dict[str, float]]:
    """Advantages of rewards with the over-long penalty, or these rewards, and its mean where there is one."""
    config = trainer.session.config
    limit, rewards, figures = config.rollout.max_response_tokens, _rewards(answers), dict[str, float]()
    buffer = config.algorithm.overlong_tokens(limit)
    if buffer:
        penalty = overlong_penalty(_lengths(answers), limit, buffer)
        rewards = rewards + penalty
        figures["reward/overlong_penalty"] = penalty.mean().item()
    if config.has_value_head:
        return rewards.tolist(), figures
    scale = config.algorithm.spec.advantages != "group_unscaled"
    return group_advantages(rewards, config.rollout.samples_per_prompt, scale=scale).tolist(), figures


def _metrics(drawn: Answers, kept: Answers, group_size: int) -> dict[str, float]:
    rewards, lengths = _rewards(drawn), _lengths(drawn)
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward/failures": drawn.failures,
        "reward/timeouts": drawn.timeouts,
        "groups/count": len(kept.groups),
        "groups/drawn": len(drawn.groups),
        "groups/degenerate": degenerate_groups(rewards, group_size) if group_size > 1 else 0,
        "response/length_mean": lengths.mean().item(),
        "response/length_max": lengths.max().item(),
        "response/truncated": sum(not rollout.finished for rollout in rollouts(drawn)) / lengths.numel(),
        "rollout/tokens": lengths.sum().item(),
        "throughput/tokens": sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts(kept)),
    }
