"""Answers to prompts over all ranks: encode, generate, decode, reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from gspo_moe.data.rendering import render_prompt
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import RewardError
from gspo_moe.parallel.groups import Groups
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.rollout.engine import Request, RolloutEngine, SamplingParams
from gspo_moe.tasks.pool import Item, TaskPool
from gspo_moe.tasks.rewards import Reward
from gspo_moe.types import Prompt, Rollout, RolloutGroup, Turn


@dataclass(frozen=True)
class ScoredGroup:
    """A prompt's rollouts and their rewards, in the same order."""

    group: RolloutGroup
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Answers:
    """Every rank's groups in the order of the prompts, and the rewards that failed among them."""

    groups: tuple[ScoredGroup, ...]
    failures: int
    timeouts: int
    first_error: str | None

    @property
    def count(self) -> int:
        return sum(len(group.rewards) for group in self.groups)

    def check(self, allow_all_failed: bool) -> Answers:
        """Itself; raises RewardError where not one answer got a reward of its own, unless that is allowed."""
        if allow_all_failed or self.failures + self.timeouts < self.count:
            return self
        raise RewardError(
            f"none of {self.count} answers got a reward; the first: {self.first_error}\nMend the reward, or set "
            "task.reward.allow_all_failed=true to go on with task.reward.failure_reward for all of them"
        )


@dataclass(frozen=True)
class Answerer:
    """Generates and rewards; data and context-parallel ranks take contiguous, nearly equal shares of the prompts."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    pool: TaskPool
    groups: Groups

    def generate(
        self, prompts: Sequence[Prompt], samples: int, params: SamplingParams, policy_version: int
    ) -> list[RolloutGroup]:
        """This rank's share of the prompts, each answered `samples` times. Collective."""
        share = self._share(prompts)
        requests = [Request(prompt.uid, tuple(render_prompt(self.tokenizer, prompt)), samples) for prompt in share]
        answered = self.engine.generate(requests, params, policy_version)
        return [
            RolloutGroup(prompt, tuple(self._with_text(rollout, params) for rollout in rollouts))
            for prompt, rollouts in zip(share, answered, strict=True)
        ]

    def rewards(self, share: Sequence[RolloutGroup]) -> Answers:
        """Rewards this rank's share and gathers every rank's. Collective."""
        batch = self._rewards(
            [(group.prompt, (Turn("policy", one.text),)) for group in share for one in group.rollouts]
        )
        rewards = iter(batch)
        mine = [ScoredGroup(group, tuple(next(rewards).total for _ in group.rollouts)) for group in share]
        errors = [reward.error for reward in batch if reward.error is not None]
        timeouts = sum(reward.timed_out for reward in batch)
        found = (mine, len(errors) - timeouts, timeouts, errors[0] if errors else None)
        parts = gather_objects(found, self.groups.data_context)
        return Answers(
            groups=tuple(group for part in parts for group in part[0]),
            failures=sum(part[1] for part in parts),
            timeouts=sum(part[2] for part in parts),
            first_error=next((part[3] for part in parts if part[3] is not None), None),
        )

    def _share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        # Context-parallel ranks generate like data-parallel ones: decoding splits no sequence.
        ranks, rank, count = self.groups.data_context.size(), self.groups.data_context.rank(), len(prompts)
        return prompts[rank * count // ranks : (rank + 1) * count // ranks]

    def _with_text(self, rollout: Rollout, params: SamplingParams) -> Rollout:
        ids = rollout.response_ids
        if ids and ids[-1] in params.stop_ids:
            ids = ids[:-1]
        return replace(rollout, text=self.tokenizer.decode(ids))

    def _rewards(self, items: Sequence[Item]) -> list[Reward]:
        # One process of each model replica rewards; the others would only repeat it.
        group = self.groups.model
        box: list[list[Reward] | None] = [self.pool.rewards(items) if group.rank() == 0 else None]
        if group.size() > 1:
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group)
        assert box[0] is not None
        return box[0]
