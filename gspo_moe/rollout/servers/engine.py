"""Rollouts from servers: a rollout engine like the embedded one.

The first rank of each copy of the model asks for its share, and tells the other ranks of the copy what came; nobody
else gets it. Invariant: every rank takes part in the same number of looks at how far all are, so that a fault, or a
signal, ends them together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gspo_moe.errors import RolloutError
from gspo_moe.parallel.reduce import gather_objects, most
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.engine import Ended, Request, SamplingParams, WeightSink
from gspo_moe.rollout.servers.counters import server_metrics
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.labels import next_label
from gspo_moe.rollout.servers.pieces import Pieces
from gspo_moe.rollout.servers.records import Answer, Ask, Servers
from gspo_moe.rollout.servers.syncing import on_main
from gspo_moe.types import Rollout

if TYPE_CHECKING:
    from gspo_moe.parallel.groups import Groups  # megatron-core's, of which servers know nothing

LOOK_SECONDS = 1.0  # between two looks at how far the other ranks are


class ServerEngine:
    """A RolloutEngine, and the WeightSink of all that it asks.

    servers: on the first rank of each copy of the model, None on the others. sink: brings them weights by their label.
    longest: of a sequence, in tokens, that model, servers and micro-batch take. words: which of them says so.
    """

    def __init__(
        self,
        servers: Servers | None,
        sink: WeightSink,
        groups: Groups,
        longest: int,
        stop: StopSignals | None = None,
    ) -> None:
        assert (servers is not None) == (groups.model.rank() == 0)
        self._servers, self._sink, self._groups = servers, sink, groups
        self._longest = longest
        self._stop = stop or StopSignals()
        self.version = 0
        self._label = 0  # of the weights of that version

    def publish(self, model: Any, version: int) -> Mapping[str, float]:
        label = self._label = on_main(lambda: next_label(self._label, version, time.time()))
        figures = self._sink.publish(model, label)
        self.version = version
        if self._servers is not None:
            self._servers.expect(label)
        return figures

    def room(self, params: SamplingParams) -> int:
        return self._longest - params.max_response_tokens

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, ended: Ended | None = None
    ) -> list[list[Rollout]]:
        """Collective over all ranks. Raises RolloutError, on every rank, for a prompt that is empty or too long, and
        once a server's answers cannot be used; Interrupted at a signal.
        """
        raise_everywhere(self._misfit(requests, params))
        under_way = _UnderWay(self._servers, ended)
        for number, request in enumerate(requests if self._servers is not None else ()):
            for k in range(request.samples):
                ask = Ask(request.uid, k, request.prompt_ids, params.max_response_tokens, params)
                under_way.submit(number, Pieces(ask))
        try:
            while True:
                raise_everywhere(under_way.take())
                self._stop.check()
                if not most(most(under_way.count, self._groups.model), self._groups.data_context):
                    break
        finally:
            under_way.give_up()
        done, mine = under_way.done, requests if self._servers is not None else ()
        return self._told([[done[number, k] for k in range(one.samples)] for number, one in enumerate(mine)])

    def metrics(self) -> dict[str, float]:
        """What all fleets did since the last call. Collective."""
        mine = (self._servers.take_counters(), self._servers.up) if isinstance(self._servers, Fleet) else None
        found = [each for each in gather_objects(mine) if each is not None]
        return server_metrics(*zip(*found, strict=True)) if found else {}

    def _misfit(self, requests: Sequence[Request], params: SamplingParams) -> RolloutError | None:
        """What is wrong with the first of these requests that cannot be answered."""
        for request in requests:
            length = len(request.prompt_ids)
            if not length:
                return RolloutError(f"prompt {request.uid} is empty; give at least one token")
            if length > self.room(params):
                return RolloutError(
                    f"prompt {request.uid} has {length} tokens and rollout.max_response_tokens is "
                    f"{params.max_response_tokens}, more than the {self._longest} that the model's positions, the "
                    "servers' context and schedule.micro_batch_tokens leave; lower one of them, or raise those"
                )
        return None

    def _told(self, rollouts: list[list[Rollout]]) -> list[list[Rollout]]:
        """The first rank's, on all ranks of this copy of the model."""
        group = self._groups.model
        if group.size() == 1:
            return rollouts
        box = [rollouts]
        dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group)
        return box[0]


class _UnderWay:
    """Answers that servers work on, and those that are whole, by request and sample."""

    def __init__(self, servers: Servers | None, ended: Ended | None) -> None:
        self.done: dict[tuple[int, int], Rollout] = {}
        self._servers, self._ended = servers, ended
        self._came: SimpleQueue[Future[Answer]] = SimpleQueue()
        self._pending: dict[Future[Answer], tuple[int, Pieces]] = {}

    @property
    def count(self) -> int:
        return len(self._pending)

    def submit(self, number: int, pieces: Pieces) -> None:
        """number: of the request."""
        assert self._servers is not None
        future = self._servers.submit(pieces.next_ask)
        self._pending[future] = (number, pieces)
        future.add_done_callback(self._came.put)

    def take(self) -> RolloutError | None:
        """Takes what comes until the next look is due or all is there; the first fault."""
        deadline = time.monotonic() + LOOK_SECONDS
        while self._pending and (left := deadline - time.monotonic()) > 0:
            try:
                future = self._came.get(timeout=left)
                number, before = self._pending.pop(future)
                pieces = before.and_then(future.result())
            except Empty:
                break
            except RolloutError as error:
                return error
            if pieces.finish is None:
                self.submit(number, pieces)
                continue
            rollout = self.done[number, pieces.ask.sample_index] = pieces.rollout()
            if self._ended is not None:
                self._ended(number, replace(rollout, routes=None))
        return None

    def give_up(self) -> None:
        for future in self._pending:
            future.cancel()
