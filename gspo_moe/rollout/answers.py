"""Answers to prompts: encode, generate, let environments answer back, decode, reward. Each rank does its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import ConfigError, DataError, RolloutError
from gspo_moe.parallel.reduce import most
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.conversation import Exchange, Talk, opened
from gspo_moe.rollout.engine import Ended, Request, RolloutEngine, SamplingParams
from gspo_moe.rollout.stop_strings import StopStrings
from gspo_moe.tasks.pool import TaskPool
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
    stop_strings: end every answer, whatever it is for.
    """

    engine: RolloutEngine
    renderer: Renderer
    pool: TaskPool
    groups: Groups
    max_turns: int | None = None
    stop_strings: StopStrings | None = None

    def start_workers(self) -> None:
        """Has those of `pool` start, where it will be asked for anything."""
        if self.groups.model.rank() == 0:
            self.pool.start()

    def generate(
        self, prompts: Sequence[Prompt], samples: int, params: SamplingParams, *, ahead: bool = False
    ) -> list[RolloutGroup]:
        """This rank's share of the prompts, each answered `samples` times, without rewards. Collective.

        ahead: has rewards of answers that end before others begun at once; the next call is `reward` of the result.
        """
        params = replace(params, stop_strings=self.stop_strings)
        share = share_of(prompts, self.groups.data_context)
        if self.max_turns is None:
            requests = self.requests([(prompt, None) for prompt in share], samples)
            begins = ahead and self.groups.model.rank() == 0
            ended = self._begin_rewards(share, samples, params) if begins else None
            answered = zip(share, self._sampled(requests, params, ended), strict=True)
            return [RolloutGroup(prompt, tuple(rollouts)) for prompt, rollouts in answered]
        return self._conversations(share, samples, params, self.max_turns)

    def _begin_rewards(self, share: Sequence[Prompt], samples: int, params: SamplingParams) -> Ended:
        over = self.pool.begin([prompt for prompt in share for _ in range(samples)])

        def ended(number: int, rollout: Rollout) -> None:
            over(number * samples + rollout.sample_index, self.with_text(rollout, params).turns)

        return ended

    def _conversations(
        self, share: Sequence[Prompt], samples: int, params: SamplingParams, max_turns: int
    ) -> list[RolloutGroup]:
        openings = self.by_one_process(self.pool.steps, [(prompt, ()) for prompt in share])
        asked = list(zip(share, openings, strict=True))
        requests = self.requests([(prompt, said.text) for prompt, said in asked], samples)
        found = [
            [Talk(prompt, opened(rollout, said, self.pool.failed)) for rollout in rollouts]
            for (prompt, said), rollouts in zip(asked, self._sampled(requests, params), strict=True)
        ]
        Exchange(
            generate=lambda requests: [one for (one,) in self._sampled(requests, params)],
            step=lambda items: self.by_one_process(self.pool.steps, items),
            render=lambda prompt, one, said: self.renderer.turn(prompt, one.turns, said, one.token_ids[-1]),
            most=lambda count: most(count, self.groups.data_context),
            room=self.engine.room(params),
            max_turns=max_turns,
            failed=self.pool.failed,
        ).carry_on([each for group in found for each in group])
        return [
            RolloutGroup(prompt, tuple(each.rollout for each in group))
            for prompt, group in zip(share, found, strict=True)
        ]

    def reward(self, share: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The same groups with rewards, but for conversations that their environment broke, which have theirs."""
        asked = [(group.prompt, one.turns) for group in share for one in group.rollouts if one.reward is None]
        found = iter(self.by_one_process(self.pool.rewards, asked))
        return [
            replace(
                group,
                rollouts=tuple(one if one.reward else replace(one, reward=next(found)) for one in group.rollouts),
            )
            for group in share
        ]

    def requests(self, asked: Sequence[tuple[Prompt, str | None]], samples: int) -> list[Request]:
        """Of each prompt with what its environment said first. Raises RolloutError, on every rank, for one rank's."""
        requests, fault = list[Request](), None
        try:
            requests = [Request(p.uid, tuple(self.renderer.prompt(p, said)), samples) for p, said in asked]
        except (ConfigError, DataError) as error:
            fault = RolloutError(str(error))
        raise_everywhere(fault)
        return requests

    def _sampled(
        self, requests: list[Request], params: SamplingParams, ended: Ended | None = None
    ) -> list[list[Rollout]]:
        answered = self.engine.generate(requests, params, ended)
        return [[self.with_text(rollout, params) for rollout in rollouts] for rollouts in answered]

    def with_text(self, rollout: Rollout, params: SamplingParams) -> Rollout:
        ids = sampled = rollout.response_ids
        if ids and ids[-1] in params.stop_ids:
            ids = ids[:-1]
        text = self.renderer.tokenizer.decode(ids)
        if params.stop_strings is not None:
            text = params.stop_strings.cut(text)
        return replace(rollout, turns=(Turn("policy", text, len(sampled)),))

    def by_one_process(self, ask: Callable[[list[Item]], list[Found]], items: list[Item]) -> list[Found]:
        """What one process of each model replica finds; the others would only repeat it."""
        group = self.groups.model
        box: list[list[Found] | None] = [ask(items) if group.rank() == 0 else None]
        if group.size() > 1:
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group)
        assert box[0] is not None
        return box[0]


def all_rollouts(groups: Iterable[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]
