"""Which prompts are asked for and which of their groups a step learns from, the same on every rank.

Policy versions count optimizer steps, of which each step of the trainer takes `updates`. A token of version v that a
step learns from which began at version V has the lag (V - v) / updates: steps that the trainer has taken since. With
`max_staleness` n the prompts of n further steps are asked for ahead, so that no lag exceeds n where each step waits for
its own prompts; where it takes what is done first, groups that came to be older are asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from gspo_moe.config.schema import Config
from gspo_moe.data.prompts import PromptSource
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.rollout.source import AheadSource, RolloutSource, Running
from gspo_moe.types import Prompt, RolloutGroup


@dataclass(frozen=True)
class Pace:
    """prompts: that a step learns from. steps: of the whole run. updates: versions a step.

    drops: steps take what is done first.
    """

    prompts: int
    steps: int
    updates: int
    max_staleness: int = 0
    drops: bool = False

    @classmethod
    def of(cls, config: Config) -> Pace:
        rollout = config.rollout
        return cls(
            rollout.prompts_per_step,
            config.schedule.steps,
            config.algorithm.mini_batches,
            rollout.max_staleness,
            rollout.stragglers == "drop",
        )

    def wanted(self, step: int) -> int:
        """Prompts of the step that follows `step` steps and of those ahead of it."""
        return self.prompts * (1 + min(self.max_staleness, self.steps - 1 - step))


@dataclass
class _Asked:
    prompt: Prompt
    group: RolloutGroup | None = None


class GroupQueue:
    """Groups on their way from a source to the steps that learn from them.

    ahead: the source, where it goes on while training runs. ranks: that share the prompts.
    """

    def __init__(
        self,
        prompts: PromptSource,
        source: RolloutSource,
        pace: Pace,
        ranks: dist.ProcessGroup,
        ahead: AheadSource | None = None,
    ) -> None:
        self._prompts, self._source, self._pace, self._ranks, self._ahead = prompts, source, pace, ranks, ahead
        self._asked: dict[str, _Asked] = {}  # in the order in which their prompts come
        self._dropped = self._dropped_tokens = 0

    def draw(self, step: int, version: int) -> list[RolloutGroup]:
        """The next groups to learn from, as many as a step has prompts, for the step that begins so. Collective.

        Their prompts stay pending in the prompt source. Those that this rank sampled have their routes.
        """
        self._ask(self._prompts.take(max(0, self._pace.wanted(step) - len(self._asked))), step)
        oldest = version - self._pace.max_staleness * self._pace.updates
        dropping = self._ahead if self._pace.drops else None  # else nothing is ever that old
        if dropping is not None:
            self._ask_again(dropping, dropping.running(), step, oldest)
        while True:
            if dropping is not None:
                came = [one.group for one in self._asked.values() if one.group is not None]
                self._ask_again(dropping, {group.prompt.uid: _age(group) for group in came}, step, oldest)
            ready = self._ready()
            if len(ready) == self._pace.prompts:
                break
            took = everyones(self._source.take(), self._ranks)
            assert took, "the source has nothing of what it was asked for"
            for group in took:
                if group.prompt.uid in self._asked:
                    self._asked[group.prompt.uid].group = group
        for group in ready:
            del self._asked[group.prompt.uid]
        return ready

    def _ask(self, prompts: Sequence[Prompt], step: int) -> None:
        self._asked |= {prompt.uid: _Asked(prompt) for prompt in prompts}
        if prompts:
            self._source.ask(prompts, step)

    def _ready(self) -> list[RolloutGroup]:
        """Those that the step may take now, in the order of their prompts."""
        asked = list(self._asked.values())
        if not self._pace.drops:
            asked = asked[: self._pace.prompts]
        return [one.group for one in asked if one.group is not None][: self._pace.prompts]

    def _ask_again(self, ahead: AheadSource, found: Mapping[str, Running], step: int, oldest: int) -> None:
        """Gives up what has tokens of versions before `oldest`, and asks for it again; its place stays."""
        old = {uid: one for uid, one in found.items() if one.oldest is not None and one.oldest < oldest}
        ahead.give_up(list(old))
        self._dropped += len(old)
        self._dropped_tokens += sum(one.tokens for one in old.values())
        self._ask([one.prompt for uid, one in self._asked.items() if uid in old], step)

    def figures(self) -> dict[str, float]:
        """Of the queue as it is, and of what happened since the last call; empty where nothing is ahead."""
        if self._ahead is None:
            return {}
        ready = sum(one.group is not None for one in self._asked.values())
        found: dict[str, float] = {
            "queue/ready": ready,
            "queue/running": len(self._asked) - ready,
            "queue/dropped": self._dropped,
            "queue/dropped_tokens": self._dropped_tokens,
        }
        self._dropped = self._dropped_tokens = 0
        return found


def lags(groups: Iterable[RolloutGroup], version: int, updates: int) -> list[tuple[int, int]]:
    """(lag, sampled tokens) of each stretch, for a step that begins at `version`."""
    stretches = (stretch for group in groups for one in group.rollouts for stretch in one.versions)
    return [((version - sampled) // updates, tokens) for sampled, tokens in stretches]


def _age(group: RolloutGroup) -> Running:
    stretches = [stretch for one in group.rollouts for stretch in one.versions]
    return Running(min(version for version, _ in stretches), sum(tokens for _, tokens in stretches))


def everyones(share: list[RolloutGroup], ranks: dist.ProcessGroup) -> list[RolloutGroup]:
    """The groups of all ranks; routes, which are too large to be gathered, stay with the rank that has them."""
    shares = gather_objects([_without_routes(each) for each in share], ranks)
    shares[ranks.rank()] = share
    return [each for of_rank in shares for each in of_rank]


def _without_routes(group: RolloutGroup) -> RolloutGroup:
    return replace(group, rollouts=tuple(replace(one, routes=None) for one in group.rollouts))
