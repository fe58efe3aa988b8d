"""Conversations of several turns: what an environment says goes behind the answer, and the policy goes on from there.

One conversation is one sequence: nothing that was sampled is encoded again. A turn's length limit is that of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gspo_moe.errors import DataError
from gspo_moe.rollout.engine import Request
from gspo_moe.tasks.rewards import Step
from gspo_moe.types import Conversation, Prompt, Reward, Rollout, Turn


@dataclass
class Talk:
    """open: the policy's turn ended by itself, so that the environment may answer."""

    prompt: Prompt
    rollout: Rollout
    open: bool = True


@dataclass(frozen=True)
class Exchange:
    """What a conversation needs. Every rank calls `generate` and `most` equally often.

    generate: goes on from each request once. step: the environment's answers, None behind the last turn.
    render: token ids of what the environment said. most: the largest number that any rank passes.
    room: the longest sequence, in tokens, that leaves room for another answer. max_turns: of the policy.
    failed: the reward of a conversation that its environment broke, of the error and whether it took too long.
    """

    generate: Callable[[list[Request]], list[Rollout]]
    step: Callable[[list[tuple[Prompt, Conversation]]], list[Step]]
    render: Callable[[Prompt, Rollout, str], list[int]]
    most: Callable[[int], int]
    room: int
    max_turns: int
    failed: Callable[[str, bool], Reward]

    def carry_on(self, conversations: Sequence[Talk]) -> None:
        """Goes on, from the policy's first turn, until every rank's conversations have ended. Collective."""
        for each in conversations:
            each.open = each.rollout.finish == "stop"
        for turn in range(1, self.max_turns + 1):
            going = self._answered(conversations, last=turn == self.max_turns)
            if not self.most(len(going)):
                break
            requests = [
                Request(f"{each.rollout.uid}/{each.rollout.sample_index}/{turn}", each.rollout.token_ids, samples=1)
                for each in going
            ]
            for each, more in zip(going, self.generate(requests), strict=True):
                each.rollout, each.open = joined(each.rollout, more), more.finish == "stop"

    def _answered(self, conversations: Sequence[Talk], last: bool) -> list[Talk]:
        """Those of the open conversations that go on, with the environment's turn in their rollouts."""
        asked = [each for each in conversations if each.open]
        going = []
        for each, step in zip(asked, self.step([(each.prompt, each.rollout.turns) for each in asked]), strict=True):
            each.open = False
            if step.error is not None:
                each.rollout = broken(each.rollout, self.failed(step.error, step.timed_out))
            elif step.text is not None:
                try:
                    ids = self.render(each.prompt, each.rollout, step.text)
                except DataError as error:
                    each.rollout = broken(each.rollout, self.failed(str(error), False))
                    continue
                if last or len(each.rollout.token_ids) + len(ids) > self.room:
                    each.rollout = replace(each.rollout, finish="length")
                else:
                    each.rollout = with_environment(each.rollout, step.text, ids)
                    going.append(each)
        return going


def opened(rollout: Rollout, said: Step, failed: Callable[[str, bool], Reward]) -> Rollout:
    """The first answer behind what the environment said at its reset, which its prompt has in it."""
    if said.error is not None:
        return broken(rollout, failed(said.error, said.timed_out))
    if said.text is None:
        return rollout
    return replace(rollout, turns=(Turn("environment", said.text), *rollout.turns))


def broken(rollout: Rollout, reward: Reward) -> Rollout:
    """The rollout as its environment's failure ends it."""
    return replace(rollout, finish="error", reward=reward)


def with_environment(rollout: Rollout, said: str, ids: Sequence[int]) -> Rollout:
    """The rollout and, behind it, what its environment said, which nobody learns."""
    return replace(
        rollout,
        token_ids=(*rollout.token_ids, *ids),
        policy_mask=(*rollout.policy_mask, *(0 for _ in ids)),
        turns=(*rollout.turns, Turn("environment", said)),
    )


def joined(before: Rollout, more: Rollout) -> Rollout:
    """One rollout of one whose tokens were the other's prompt. Routes are the last pass's, which saw every token."""
    assert more.token_ids[: len(before.token_ids)] == before.token_ids
    added = len(more.token_ids) - len(before.token_ids)
    return replace(
        before,
        token_ids=more.token_ids,
        policy_mask=before.policy_mask + more.policy_mask[-added:],
        log_probs=before.log_probs + more.log_probs,
        finish=more.finish,
        versions=before.versions + more.versions,
        turns=before.turns + more.turns,
        routes=more.routes,
    )
