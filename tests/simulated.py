"""Rollout servers in a time of their own: nothing sleeps, and every token says who sampled it and when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gspo_moe.rollout.servers.counters import Counters
from gspo_moe.rollout.servers.records import Answer, Ask
from gspo_moe.types import Prompt
from tests.servers import Servers

PROMPT = 2  # tokens of every prompt
STOP = 59
VOCAB = 1000


def token(uid: str, sample: int, place: int, version: int) -> int:
    """What the policy of that version samples at a place of an answer."""
    return 100 + (7 * sum(map(ord, uid)) + 31 * sample + 3 * place + 11 * version) % (VOCAB - 100)


def log_prob(token_id: int, place: int, version: int) -> float:
    return -(1.0 + token_id / VOCAB + place / 64 + version / 1024)


def route(position: int, version: int) -> list[list[int]]:
    """One layer, two experts: of the input at that position, by that version's forward pass."""
    return [[position, 50 + version]]


class Endless:
    """Prompts without an end."""

    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(str(index), "?!", "letters")

    def size(self, split: str) -> None:
        return None


class Clock:
    """Runs what was put off, in the order of its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._later, (self.now + seconds, next(self._count), do))

    def step(self) -> None:
        """To the next thing that happens."""
        assert self._later, "everything waits for something that never comes"
        self.now, _, do = heapq.heappop(self._later)
        do()

    def run(self, seconds: float) -> None:
        """Lets so much time pass."""
        until = self.now + seconds
        while self._later and self._later[0][0] <= until:
            self.step()
        self.now = until


@dataclass
class _Given:
    """An Ask and when it got a slot; None while it waits for one."""

    ask: Ask
    future: Future[Answer]
    since: float | None = None


class SimulatedServers(Servers):
    """`Servers` of so many slots, on which each answer takes its own time.

    length: tokens of the whole answer to (uid, sample), the end token with them. pace: seconds a token.
    """

    def __init__(
        self,
        clock: Clock,
        length: Callable[[str, int], int],
        pace: Callable[[Ask], float],
        version: int = 0,
        slots: int = 1000,
    ) -> None:
        super().__init__()
        self._clock, self._length, self._pace, self.version, self._slots = clock, length, pace, version, slots
        self._given: list[_Given] = []
        self._paused = False
        self._counters = Counters()
        self.asked: list[Ask] = []
        self.fail: dict[str, Exception] = {}

    def submit(self, ask: Ask) -> Future[Answer]:
        one = _Given(ask, Future())
        self._counters.begin(self._clock.now)
        one.future.add_done_callback(lambda _: self._counters.end(self._clock.now))
        self.asked.append(ask)
        self._given.append(one)
        self._start()
        return one.future

    def close(self) -> None:
        self._given.clear()

    def take_counters(self) -> Counters:
        self._counters.advance(self._clock.now)
        taken, self._counters = self._counters, self._counters.successor()
        return taken

    def publish(self, version: int) -> None:
        """Breaks every answer off, of some before their first token, and changes the weights."""
        self._paused = True
        given, self._given = self._given, []
        for one in given:
            elapsed = 0.0 if one.since is None else self._clock.now - one.since
            done = int(elapsed / self._pace(one.ask))
            self._finish(one, min(done, self._left(one.ask) - 1, one.ask.max_tokens), "abort")
        self.version, self._paused = version, False
        self._start()

    def _left(self, ask: Ask) -> int:
        return self._length(ask.uid, ask.sample_index) - (len(ask.token_ids) - PROMPT)

    def _start(self) -> None:
        self._given = [one for one in self._given if not one.future.cancelled()]
        for one in [] if self._paused else self._given[: self._slots]:
            if one.since is None:
                one.since = self._clock.now
                sampled = min(self._left(one.ask), one.ask.max_tokens)
                seconds = sampled * self._pace(one.ask)
                self._clock.after(seconds, partial(self._end, one, sampled))

    def _end(self, one: _Given, sampled: int) -> None:
        if one in self._given:
            self._given.remove(one)
            self._finish(one, sampled, "stop" if sampled == self._left(one.ask) else "length")
            self._start()

    def _finish(self, one: _Given, sampled: int, finish: Any) -> None:
        if one.future.cancelled():
            return
        if one.ask.uid in self.fail:
            one.future.set_exception(self.fail[one.ask.uid])
        else:
            one.future.set_result(answer(one.ask, sampled, finish, self.version))


def answer(ask: Ask, sampled: int, finish: Any, version: int) -> Answer:
    """What a policy of that version says behind the Ask."""
    first = len(ask.token_ids) - PROMPT
    ids = [token(ask.uid, ask.sample_index, place, version) for place in range(first, first + sampled)]
    if finish == "stop":
        ids[-1] = STOP
    total = len(ask.token_ids) + sampled
    return Answer(
        token_ids=tuple(ids),
        log_probs=tuple(log_prob(one, first + i, version) for i, one in enumerate(ids)),
        finish=finish,
        version=version,
        routes=np.array([route(t, version) for t in range(total - 1)], dtype=np.int16),
    )


class Letters:
    """A tokenizer whose token n is a letter of its own."""

    vocab_size = VOCAB
    chat_template = special = None
    eos_id = STOP

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x100 + one) for one in ids)
