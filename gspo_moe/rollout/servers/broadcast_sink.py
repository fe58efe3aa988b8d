"""New weights for servers by broadcast from the first rank, bucket by bucket: NCCL between GPUs, gloo between CPUs.

The first rank holds two buckets of weights: one that servers take, and one that comes to it meanwhile from whichever
processes have it. Servers pause from when the first is whole. One that is lost in the midst breaks the group, which is
left, and those that remain get all weights anew in another. Over NCCL this has not been run.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from gspo_moe.errors import RolloutError
from gspo_moe.model.build import Model
from gspo_moe.model.placement import Placement
from gspo_moe.rollout.servers.buckets import TensorHead, buckets
from gspo_moe.rollout.servers.probe import Probe
from gspo_moe.rollout.servers.records import Dialect, Post, Servers
from gspo_moe.rollout.servers.syncing import MAIN, on_main
from gspo_moe.rollout.servers.transfer_group import ROOT, await_broadcast, join_transfer_group, start_broadcast
from gspo_moe.rollout.servers.transfers import TIMEOUT_SECONDS, Meeting, Transfer

BUCKET_BYTES = 1_000_000_000

_Part = tuple[list[TensorHead], torch.Tensor]


@dataclass(frozen=True)
class _Joined:
    """servers: how many of them are in the group."""

    meeting: Meeting
    group: dist.ProcessGroup
    servers: int


@dataclass(frozen=True)
class _Bucket:
    """On its way. taken: the servers' answers to its announcement."""

    content: torch.Tensor
    work: dist.Work
    taken: Future[list[Any]]


class BroadcastSink:
    """A WeightSink. servers: used on the first rank alone. address: of that rank's machine, as the servers reach it.

    timeout_seconds: for servers to join, and to take a bucket.
    """

    def __init__(
        self,
        servers: Servers,
        dialect: Dialect,
        transfer: Transfer,
        probe: Probe,
        address: str,
        bucket_bytes: int = BUCKET_BYTES,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._servers, self._dialect, self._transfer, self._probe = servers, dialect, transfer, probe
        self._address, self._bucket_bytes, self._timeout = address, bucket_bytes, timeout_seconds
        self._joined: _Joined | None = None  # on the first rank
        self._spare = 0  # further tries, though no server is lost

    @torch.no_grad()
    def publish(self, model: Model, version: int) -> dict[str, float]:
        """Metrics of the sync. Collective.

        Raises RolloutError where no server is left, one does not take the weights or does not hold them afterwards.
        """
        start = time.perf_counter()
        placement = Placement(model)
        device = next(model.chunks[0].parameters()).device
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._spare, settled = 1, False
        while not settled:
            on_main(lambda: self._meet(backend))
            nbytes, failure = self._send(placement, version)
            settled = on_main(partial(self._settle, failure, version))
        difference = self._probe.check(model, version)
        seconds = time.perf_counter() - start
        return {"sync/seconds": seconds, "sync/bytes": float(nbytes), "sync/probe_difference": difference}

    def _meet(self, backend: str) -> None:
        """Has a group with the servers that are up, those that waited for weights among them."""
        if self._servers.begin_sync():
            self._leave()
        self._everywhere(*self._transfer.abandon())  # what was begun and never ended, perhaps by a run that was killed
        while self._joined is None or self._joined.servers != self._servers.up:
            self._leave()
            counts = [self._transfer.worker_count(body) for body in self._servers.everywhere(self._transfer.workers())]
            try:
                self._joined = self._join(backend, counts)
            except RolloutError:
                if self._servers.up in (0, len(counts)):
                    raise

    def _join(self, backend: str, counts: Sequence[int]) -> _Joined:
        """counts: of each server's workers."""
        meeting = Meeting(self._address, _free_port(), 1 + sum(counts), backend, self._timeout)
        posts = [self._transfer.join(meeting, 1 + sum(counts[:number])) for number in range(len(counts))]
        with ThreadPoolExecutor(max_workers=1) as pool:
            joined = pool.submit(self._servers.each, posts)
            try:
                group = join_transfer_group(
                    meeting.address,
                    meeting.port,
                    rank=ROOT,
                    world_size=meeting.world_size,
                    name=meeting.name,
                    backend=backend,
                    timeout_seconds=meeting.timeout_seconds,
                )
            except RuntimeError as error:  # of torch's store, or of gloo or NCCL
                raise RolloutError(
                    f"not all {meeting.world_size - 1} workers of the servers came to {meeting.address}:{meeting.port} "
                    f"({error}); let them reach that address, or give them weights by a folder"
                ) from error
            joined.result()
        return _Joined(meeting, group, len(counts))

    def _leave(self) -> None:
        if self._joined is not None:
            dist.destroy_process_group(self._joined.group)
            self._joined = None

    def _everywhere(self, *posts: Post) -> None:
        for post in posts:
            self._servers.everywhere(post)

    def _send(self, placement: Placement, version: int) -> tuple[int, RolloutError | None]:
        """The bytes sent, and what went wrong, both on the first rank. Collective."""
        nbytes, failure = 0, None
        running: _Bucket | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:
            for part in chain(buckets(_to_main(placement), self._bucket_bytes), [None]):
                nbytes += 0 if part is None else part[1].numel()
                if failure is None:  # after one the others' tensors still have to be taken from them
                    try:
                        running = self._put(running, part, version, pool)
                    except RolloutError as error:
                        failure = error
        return nbytes, failure

    def _put(
        self, before: _Bucket | None, part: _Part | None, version: int, pool: ThreadPoolExecutor
    ) -> _Bucket | None:
        """Waits until the bucket before has arrived, and sends this one; the first of all once servers pause."""
        if before is not None:
            self._await(before)
        if part is None:
            return None
        if before is None:
            self._everywhere(self._dialect.pause(), *self._transfer.begin())
        assert self._joined is not None
        heads, content = part
        taken = pool.submit(self._servers.everywhere, self._transfer.receive(self._joined.meeting, heads, version))
        try:
            return _Bucket(content, start_broadcast(content, self._joined.group, ROOT), taken)
        except RuntimeError as error:
            raise _broken(error) from error

    def _await(self, bucket: _Bucket) -> None:
        """Raises RolloutError where not all servers of the group took it."""
        assert self._joined is not None
        group, servers = self._joined.group, self._joined.servers

        def broken() -> bool:
            refused = bucket.taken.done() and bucket.taken.exception() is not None  # it never comes to the broadcast
            return refused or self._servers.up < servers

        try:
            await_broadcast(bucket.work, group, self._timeout, broken)
        except RuntimeError as error:  # of gloo or NCCL, too
            bucket.taken.result()
            raise _broken(error) from error
        bucket.taken.result()

    def _settle(self, failure: RolloutError | None, version: int) -> bool:
        """Whether the servers that are left have the weights; False where they are to get them anew."""
        if failure is None:
            self._everywhere(*self._transfer.finish(version), self._dialect.resume())
            return True
        assert self._joined is not None
        lost = self._servers.up < self._joined.servers
        self._leave()
        if not self._servers.up or not (lost or self._spare):
            raise failure
        self._spare -= not lost
        return False


def _broken(error: Exception) -> RolloutError:
    return RolloutError(f"the broadcast of weights broke off ({error}); start the servers that are gone again")


def _to_main(placement: Placement) -> Iterator[tuple[str, torch.Tensor]]:
    for joined in placement.joined:
        yield from placement.fetch(joined, MAIN)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
