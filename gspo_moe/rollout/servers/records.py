"""What the trainer and rollout servers say to each other, whatever the server is and however it is reached.

Everything is token ids: text never crosses the wire. A server answers each `Ask` with one `Answer`, of weights that
the trainer has published to it before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from gspo_moe.errors import RolloutError
from gspo_moe.rollout.engine import SamplingParams


class BadAnswer(RolloutError):
    """A server's answer that nothing can be learnt from; asking again, another server too, may give a good one."""


class ServerDown(RolloutError):
    """A server that cannot be reached, or broke off in the middle of an answer."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: tokens to go on from. params.seed with uid and sample_index fixes what is sampled.

    token_ids: the prompt, and in front of the continuation of a broken-off answer what was sampled of it before.
    max_tokens: to be sampled now. sampled: how many of the last token_ids were sampled before, for stop strings.
    """

    uid: str
    sample_index: int
    token_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    sampled: int = 0


@dataclass(frozen=True)
class Answer:
    """What a server sampled behind an Ask's tokens.

    token_ids, log_probs: one each a sampled token, end tokens included; of the sampling temperature's untruncated
    distribution (nats). What was sampled behind a stop string is cut off.
    abort: broken off by the server, so that its weights can change; what is there is good.
    version: of the policy, when the first of these tokens was sampled and when the last one was: the same; -1 where
    there is no token. As a Dialect reads it, the label (`labels`).
    routes: integers [tokens asked + tokens sampled - 1, MoE layers, K], None where they were not asked for.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Literal["stop", "length", "abort"]
    version: int
    routes: np.ndarray | None = None


@dataclass(frozen=True)
class Post:
    """A request to a server: body None is a GET, an empty one a POST without a body.

    version: the label of the weights that a server has once it has done this; a server that was away is told all such
    posts of the newest weights again before it gets another Ask.
    seconds: for the answer, where that is not to take as long as a whole checkpoint may.
    or_out: a server that answers it with any fault is out.
    """

    path: str
    body: dict[str, Any] | None = None
    version: int | None = None
    seconds: float | None = None
    or_out: bool = False


@dataclass(frozen=True)
class Served:
    """What a server says of itself.

    name: where its model comes from. keys: of its config.json, none where it is not seen from here. dtype: "fp32", or
    another's name. routes: whether it can report them. positions: the longest sequence, None where it does not tell.
    faults: in its settings, with their fixes.
    """

    name: str
    keys: Mapping[str, Any]
    dtype: str
    routes: bool
    positions: int | None = None
    faults: tuple[str, ...] = ()


class Dialect(Protocol):
    """How a kind of server is spoken to: pure, no I/O."""

    @property
    def name(self) -> str: ...

    def ask(self, ask: Ask) -> Post: ...

    def answer(self, ask: Ask, body: Any) -> Answer:
        """Raises BadAnswer where log-probs are missing, too many or not finite, tokens are not of the vocabulary,
        routes do not fit the tokens, or the version is not the one published.
        """
        ...

    def questions(self, temperature: float) -> tuple[Post, ...]:
        """Whose answers tell whether a server fits the run, which samples at this temperature."""
        ...

    def served(self, bodies: Sequence[Any], temperature: float, truncates: bool) -> Served:
        """Of the answers; truncates: the run samples by top-k or top-p.

        Raises AttributeError, IndexError, KeyError, TypeError or ValueError where they are not as expected.
        """
        ...

    def tokenize(self, text: str) -> Post:
        """Answered with `tokens`, ids of the text alone, where the server has a tokenizer."""
        ...

    def health(self) -> Post: ...

    def pause(self) -> Post:
        """Ends running answers with `abort` and takes no new ones until `resume`."""
        ...

    def resume(self) -> Post: ...

    def weights(self) -> Post:
        """Asks for the label of the weights that a server has."""
        ...

    def version(self, body: Any) -> int | None:
        """Of `weights`' answer; None where the trainer has given it none."""
        ...

    def load_folder(self, folder: str, version: int) -> tuple[Post, ...]:
        """Has a paused server take the weights of an HF folder that it sees too: requests to make in this order.

        Cached prefixes are forgotten by then.
        """
        ...


class Servers(Protocol):
    """All rollout servers of a run, as one process reaches them."""

    @property
    def up(self) -> int:
        """How many servers `everywhere` reaches; one that breaks off is not among them at once."""
        ...

    def begin_sync(self) -> int:
        """From now on until `expect` no server comes back, and `everywhere` reaches those that wait for weights, too.

        How many these are.
        """
        ...

    def submit(self, ask: Ask) -> Future[Answer]:
        """Sends to the least loaded server that is healthy, again elsewhere where one fails.

        The future raises RolloutError once the retries are used up. No Ask has two answers.
        """
        ...

    def everywhere(self, post: Post) -> list[Any]:
        """The same request to every server that is up: their answers.

        One that is down now, or breaks off, is out and has no answer. Raises RolloutError where one refuses (but
        `or_out`), and where none is up.
        """
        ...

    def each(self, posts: Sequence[Post]) -> list[Any]:
        """One request for each server, all at once, in the order of `everywhere`'s answers, and as that otherwise."""
        ...

    def expect(self, version: int) -> None:
        """The label of the weights that all servers have that are up; others are out.

        No older answer to a new Ask counts.
        """
        ...

    def close(self) -> None: ...
