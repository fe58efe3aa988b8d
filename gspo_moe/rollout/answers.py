"""Answers to prompts: encode, generate, let environments answer back, decode, reward. Each rank does its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from gspo_moe.data.rendering import render_prompt, render_turn
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import RewardError
from gspo_moe.parallel.reduce import gather_objects, most
from gspo_moe.rollout.conversation import Conversation, Exchange
from gspo_moe.rollout.engine import Request, RolloutEngine, SamplingParams
from gspo_moe.tasks.rewards import RewardPool
from gspo_moe.types import Prompt, Rollout, RolloutGroup, Turn

if TYPE_CHECKING:
    from gspo_moe.parallel.groups import Groups  # a client of a server has no use for megatron-core

Item = TypeVar("Item")
Found = TypeVar("Found")


def share_of(items: Sequence[Item], group: dist.ProcessGroup) -> Sequence[Item]:
    """This rank's contiguous, nearly equal share."""
    ranks, rank, count = group.size(), group.rank(), len(items)
    return items[rank * count // ranks : (rank + 1) * count // ranks]


@dataclass(frozen=True)
class Answerer:
    """Generates and rewards; data and context-parallel ranks take shares of the prompts: decoding splits no sequence.

    max_turns: of the policy in one conversation; None for a task whose answers have no sequel.
    """

    engine: RolloutEngine
    tokenizer: Tokenizer
    pool: RewardPool
    groups: Groups
    max_turns: int | None = None

    def generate(self, prompts: Sequence[Prompt], samples: int, params: SamplingParams) -> list[RolloutGroup]:
        """This rank's share of the prompts, each answered `samples` times, without rewards. Collective."""
        share = share_of(prompts, self.groups.data_context)
        requests = [Request(p.uid, tuple(render_prompt(self.tokenizer, p)), samples) for p in share]
        found = [
            [Conversation(prompt, rollout) for rollout in rollouts]
            for prompt, rollouts in zip(share, self._sampled(requests, params), strict=True)
        ]
        if self.max_turns is not None:
            self._exchange(params, self.max_turns).carry_on([each for group in found for each in group])
        return [
            RolloutGroup(prompt, tuple(each.rollout for each in group))
            for prompt, group in zip(share, found, strict=True)
        ]

    def reward(self, share: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The same groups with rewards, but for conversations that their environment broke, which have theirs."""
        asked = [(group.prompt, one.turns) for group in share for one in group.rollouts if one.reward is None]
        found = iter(self._by_one_process(self.pool.rewards, asked))
        return [
            replace(
                group,
                rollouts=tuple(one if one.reward else replace(one, reward=next(found)) for one in group.rollouts),
            )
            for group in share
        ]

    def gather(self, share: Sequence[RolloutGroup]) -> list[list[RolloutGroup]]:
        """Every rank's groups without their routes, by rank of `Groups.data_context`. Collective."""
        light = [replace(g, rollouts=tuple(replace(r, routes=None) for r in g.rollouts)) for g in share]
        return gather_objects(light, self.groups.data_context)

    def _sampled(self, requests: list[Request], params: SamplingParams) -> list[list[Rollout]]:
        answered = self.engine.generate(requests, params)
        return [[self._with_text(rollout, params) for rollout in rollouts] for rollouts in answered]

    def _with_text(self, rollout: Rollout, params: SamplingParams) -> Rollout:
        ids = rollout.token_ids[rollout.prompt_length :]
        if ids and ids[-1] in params.stop_ids:
            ids = ids[:-1]
        return replace(rollout, turns=(Turn("policy", self.tokenizer.decode(ids)),))

    def _exchange(self, params: SamplingParams, max_turns: int) -> Exchange:
        return Exchange(
            generate=lambda requests: [one for (one,) in self._sampled(requests, params)],
            step=lambda items: self._by_one_process(self.pool.steps, items),
            render=lambda prompt, turns, said: render_turn(self.tokenizer, prompt, turns, said),
            most=lambda count: most(count, self.groups.data_context),
            room=self.engine.room(params),
            max_turns=max_turns,
            failure_reward=self.pool.failure_reward,
        )

    def _by_one_process(self, ask: Callable[[list[Item]], list[Found]], items: list[Item]) -> list[Found]:
        """What one process of each model replica finds; the others would only repeat it."""
        group = self.groups.model
        box: list[list[Found] | None] = [ask(items) if group.rank() == 0 else None]
        if group.size() > 1:
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group)
        assert box[0] is not None
        return box[0]


def all_rollouts(groups: Iterable[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def first_error(groups: Iterable[RolloutGroup]) -> str | None:
    """Why the first rollout without a reward of its own got none."""
    return next((r.reward.error for r in all_rollouts(groups) if r.reward is not None and r.reward.error), None)


def check_rewarded(groups: Sequence[RolloutGroup], allow_all_failed: bool) -> None:
    """Raises RewardError where not one rollout got a reward of its own, unless that is allowed."""
    rewards = [rollout.reward for rollout in all_rollouts(groups)]
    if allow_all_failed or not rewards or any(reward is None or reward.error is None for reward in rewards):
        return
    raise RewardError(
        f"none of {len(rewards)} answers got a reward; the first: {first_error(groups)}\nMend the reward, or set "
        "task.reward.allow_all_failed=true to go on with task.reward.failure_reward for all of them"
    )
