"""One answer that weights may change in the midst of: what was sampled stays, and the rest is sampled by the new ones.

Shape letters: P tokens of the prompt, A MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from gspo_moe.rollout.servers.records import Answer, Ask
from gspo_moe.types import Finish, Rollout


@dataclass(frozen=True)
class Pieces:
    """The first Ask and the answers to it and to what followed it, each of which goes on behind the one before.

    Answers without a token, which servers break off before their first, are not kept.
    """

    ask: Ask
    answers: tuple[Answer, ...] = ()
    finish: Finish | None = None

    def and_then(self, answer: Answer) -> Pieces:
        """With one more answer. An aborted one that has used up the tokens ends at its length."""
        answers = (*self.answers, answer) if answer.token_ids else self.answers
        finish: Finish | None = answer.finish if answer.finish != "abort" else None
        if finish is None and sum(len(one.token_ids) for one in answers) >= self.ask.max_tokens:
            finish = "length"
        return replace(self, answers=answers, finish=finish)

    @property
    def next_ask(self) -> Ask:
        """For the rest. Its random numbers are others than those of what is there, which the same seed would repeat."""
        sampled = self.token_ids
        if not sampled:
            return self.ask
        return replace(
            self.ask,
            token_ids=self.ask.token_ids + sampled,
            max_tokens=self.ask.max_tokens - len(sampled),
            sampled=len(sampled),
            params=replace(self.ask.params, seed=f"{self.ask.params.seed}/{len(sampled)}"),
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that were sampled."""
        return tuple(token for one in self.answers for token in one.token_ids)

    @property
    def oldest(self) -> int | None:
        """The first policy version that sampled a token; None before that."""
        return min((one.version for one in self.answers), default=None)

    def rollout(self) -> Rollout:
        """The whole answer, which has ended."""
        assert self.finish is not None, "still being sampled"
        prompt, sampled = self.ask.token_ids, self.token_ids
        by_version = groupby(self.answers, key=lambda one: one.version)
        return Rollout(
            uid=self.ask.uid,
            sample_index=self.ask.sample_index,
            token_ids=prompt + sampled,
            policy_mask=(0,) * len(prompt) + (1,) * len(sampled),
            log_probs=tuple(value for one in self.answers for value in one.log_probs),
            finish=self.finish,
            versions=tuple((version, sum(len(one.token_ids) for one in same)) for version, same in by_version),
            routes=joined_routes(self.answers),
        )


def joined_routes(answers: Sequence[Answer]) -> torch.Tensor | None:
    """Routes [P + sampled - 1, A, K] of which row t is of the forward pass whose logits token t + 1 was drawn from.

    Each answer has rows for all tokens before it too, of its own weights, with which nobody drew those.
    """
    rows, start = list[np.ndarray](), 0
    for one in answers:
        if one.routes is None:
            return None
        rows.append(one.routes[start:])
        start = len(one.routes)
    return torch.from_numpy(np.concatenate(rows)) if rows else None
