"""Answers that servers sample while the trainer does something else.

Strategy: every answer goes on by itself. A thread of `Servers` tells of each that a server gave; one that was broken
off, because weights change, is asked for again from where it stands, and a prompt's last answer has its rewards begun.
The trainer's thread only asks, takes what is whole, and gives up what it does not want any more.
Invariant: all state is behind `_change`, and no answer of a prompt that was given up is ever looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from gspo_moe.config.schema import Config
from gspo_moe.errors import RolloutError, RunError
from gspo_moe.observability.timers import Timers
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.answers import Answerer, share_of
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.rollout.servers.pieces import Pieces
from gspo_moe.rollout.servers.records import Answer, Ask, Servers
from gspo_moe.rollout.source import Running, training_params
from gspo_moe.tasks.pool import Over
from gspo_moe.types import Prompt, Rollout, RolloutGroup

POLL_SECONDS = 0.02  # between two looks of a rank that waits at what the others have
Wait = Callable[[threading.Condition, float], object]


@dataclass
class _Open:
    """A prompt whose answers are under way, of which `ended` are whole. over: is told of each of these."""

    prompt: Prompt
    params: SamplingParams
    pieces: list[Pieces]
    over: Over
    ended: dict[int, Rollout] = field(default_factory=dict)
    futures: dict[int, Future[Answer]] = field(default_factory=dict)
    given_up: bool = False

    def running(self) -> Running:
        known = [each.oldest for each in self.pieces if each.oldest is not None]
        return Running(min(known, default=None), sum(len(each.token_ids) for each in self.pieces))


class ServerSource:
    """A RolloutSource of servers, which go on with what was asked until it is taken.

    servers: on the first rank of each model replica; None on the others, which get what they train on from it.
    wait: of the thread that takes; a test's may run in a time of its own.
    """

    def __init__(
        self,
        servers: Servers | None,
        answerer: Answerer,
        config: Config,
        stop_ids: frozenset[int],
        timers: Timers,
        stop: StopSignals,
        wait: Wait = threading.Condition.wait,
    ) -> None:
        self._servers, self._answerer, self._config, self._stop_ids = servers, answerer, config, stop_ids
        self._timers, self._stop, self._wait = timers, stop, wait
        self._change = threading.Condition()
        self._open: dict[str, _Open] = {}
        self._whole: list[_Open] = []
        self._fault: BaseException | None = None

    def ask(self, prompts: Sequence[Prompt], step: int) -> None:
        """As `RolloutSource`; each data-parallel rank asks for its share.

        Collective. Raises RolloutError, on every rank, for a prompt that cannot be rendered or is too long.
        """
        share = share_of(prompts, self._answerer.groups.data_context)
        samples = self._config.rollout.samples_per_prompt
        requests = self._answerer.requests([(prompt, None) for prompt in share], samples)
        params = training_params(self._config, self._stop_ids, step)
        params = replace(params, stop_strings=self._answerer.stop_strings)
        raise_everywhere(_misfit(requests, self._answerer.engine.room(params)))
        if self._servers is None:
            return
        for prompt, request in zip(share, requests, strict=True):
            self._start(prompt, request, params)

    def _start(self, prompt: Prompt, request: Request, params: SamplingParams) -> None:
        over = self._answerer.pool.begin([prompt] * request.samples)
        pieces = [
            Pieces(Ask(request.uid, number, request.prompt_ids, params.max_response_tokens, params))
            for number in range(request.samples)
        ]
        one = _Open(prompt, params, pieces, over)
        with self._change:
            self._open[prompt.uid] = one
        for number in range(request.samples):
            self._send(one, number)

    def _send(self, one: _Open, number: int) -> None:
        """Not while `_change` is held, for which the thread of `Servers` may be waiting."""
        assert self._servers is not None
        future = self._servers.submit(one.pieces[number].next_ask)
        with self._change:
            one.futures[number] = future
        future.add_done_callback(partial(self._answered, one, number))

    def _answered(self, one: _Open, number: int, future: Future[Answer]) -> None:
        """On the thread of `Servers`: goes on with the answer, or notes that it has ended."""
        try:
            with self._change:
                if one.given_up:
                    return
                pieces = one.pieces[number] = one.pieces[number].and_then(future.result())
                if pieces.finish is not None:
                    self._ended(one, number)
            if pieces.finish is None:
                self._send(one, number)
        except BaseException as error:  # nobody would see it on that thread
            with self._change:
                self._fault = self._fault or error
                self._change.notify_all()

    def _ended(self, one: _Open, number: int) -> None:
        rollout = one.ended[number] = self._answerer.with_text(one.pieces[number].rollout(), one.params)
        one.over(number, rollout.turns)
        if len(one.ended) == len(one.pieces):
            self._whole.append(one)
            del self._open[one.prompt.uid]
            self._change.notify_all()

    def take(self) -> list[RolloutGroup]:
        """As `RolloutSource`. Raises on every rank what servers failed with; Interrupted at a signal."""
        with self._timers("waiting"):
            while not self._something_came():
                pass
        with self._timers("reward"):
            return self._answerer.by_one_process(lambda _: self._taken(), [])

    def _something_came(self) -> bool:
        """Looks once, together with all ranks; True too where nothing is to come."""
        with self._change:
            if self._open and not self._whole and self._fault is None:
                self._wait(self._change, POLL_SECONDS)
            fault, whole, running = self._fault, len(self._whole), len(self._open)
        if fault is not None and not isinstance(fault, RunError):
            raise fault
        ranks = gather_objects((whole, running, fault))
        for _, _, error in ranks:
            if error is not None:
                raise error
        self._stop.check()
        return any(whole for whole, _, _ in ranks) or not any(running for _, running, _ in ranks)

    def _taken(self) -> list[RolloutGroup]:
        with self._change:
            whole, self._whole = self._whole, []
        return [self._rewarded(one) for one in whole]

    def _rewarded(self, one: _Open) -> RolloutGroup:
        rollouts = [one.ended[number] for number in range(len(one.pieces))]
        rewards = self._answerer.pool.rewards([(one.prompt, rollout.turns) for rollout in rollouts])
        found = zip(rollouts, rewards, strict=True)
        return RolloutGroup(one.prompt, tuple(replace(rollout, reward=reward) for rollout, reward in found))

    def running(self) -> dict[str, Running]:
        """As `AheadSource`."""
        with self._change:
            here = {uid: one.running() for uid, one in self._open.items()}
        return {uid: one for each in gather_objects(here) for uid, one in each.items()}

    def give_up(self, uids: Sequence[str]) -> None:
        """Wants no answers to these prompts, as far as this rank has any that are not taken."""
        with self._change:
            given_up = [one for one in (*self._open.values(), *self._whole) if one.prompt.uid in uids]
            for one in given_up:
                one.given_up = True
                self._answerer.pool.forget([one.prompt] * len(one.pieces))
                self._open.pop(one.prompt.uid, None)
            self._whole = [one for one in self._whole if not one.given_up]
            futures = [future for one in given_up for future in one.futures.values()]
        for future in futures:
            future.cancel()

    def close(self) -> None:
        """Gives everything up."""
        with self._change:
            uids = [*self._open, *(one.prompt.uid for one in self._whole)]
        self.give_up(uids)


def _misfit(requests: Sequence[Request], room: int) -> RolloutError | None:
    long = next((one for one in requests if len(one.prompt_ids) > room), None)
    if long is None:
        return None
    return RolloutError(
        f"prompt {long.uid} has {len(long.prompt_ids)} tokens, and beside an answer model, servers and "
        f"schedule.micro_batch_tokens have room for {room}; lower rollout.max_response_tokens, or raise the smallest"
    )
