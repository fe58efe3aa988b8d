"""New weights for servers by broadcast from the first rank, bucket by bucket: NCCL between GPUs, gloo between CPUs.

The first rank holds one bucket of weights at a time, which come to it from whichever processes have them. Over NCCL
this has not been run.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from gspo_moe.errors import RolloutError
from gspo_moe.model.build import Model
from gspo_moe.model.placement import Placement
from gspo_moe.rollout.servers.buckets import TensorHead, buckets
from gspo_moe.rollout.servers.probe import Probe
from gspo_moe.rollout.servers.records import Dialect, Post, Servers
from gspo_moe.rollout.servers.syncing import MAIN, on_main
from gspo_moe.rollout.servers.transfer_group import ROOT, join_transfer_group, start_broadcast
from gspo_moe.rollout.servers.transfers import Meeting, Transfer

BUCKET_BYTES = 1_000_000_000
TIMEOUT_SECONDS = 300.0


class BroadcastSink:
    """A WeightSink. servers: used on the first rank alone. address: of that rank's machine, as the servers reach it."""

    def __init__(
        self,
        servers: Servers,
        dialect: Dialect,
        transfer: Transfer,
        probe: Probe,
        address: str,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._servers, self._dialect, self._transfer, self._probe = servers, dialect, transfer, probe
        self._address, self._bucket_bytes = address, bucket_bytes
        self._joined: tuple[Meeting, dist.ProcessGroup] | None = None  # on the first rank

    @torch.no_grad()
    def publish(self, model: Model, version: int) -> dict[str, float]:
        """Metrics of the sync. Collective.

        Raises RolloutError where a server cannot be reached, does not take the weights or does not hold them
        afterwards.
        """
        start = time.perf_counter()
        placement = Placement(model)
        device = next(model.chunks[0].parameters()).device
        on_main(lambda: self._begin("nccl" if device.type == "cuda" else "gloo"))
        nbytes, failure = self._send(placement, version)

        def finish() -> None:
            if failure is not None:
                raise failure
            self._everywhere(self._transfer.finish(version))
            self._servers.everywhere(self._dialect.resume())

        on_main(finish)
        difference = self._probe.check(model, version)
        seconds = time.perf_counter() - start
        return {"sync/seconds": seconds, "sync/bytes": float(nbytes), "sync/probe_difference": difference}

    def _begin(self, backend: str) -> None:
        if self._joined is None:
            self._joined = self._join(backend)
        self._servers.everywhere(self._dialect.pause())
        self._everywhere(self._transfer.begin())

    def _join(self, backend: str) -> tuple[Meeting, dist.ProcessGroup]:
        counts = [self._transfer.worker_count(body) for body in self._servers.everywhere(self._transfer.workers())]
        meeting = Meeting(self._address, _free_port(), 1 + sum(counts), backend, TIMEOUT_SECONDS)
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
        return meeting, group

    def _everywhere(self, posts: tuple[Post, ...]) -> None:
        for post in posts:
            self._servers.everywhere(post)

    def _send(self, placement: Placement, version: int) -> tuple[int, RolloutError | None]:
        """The bytes sent, and what went wrong, both on the first rank. Collective."""
        nbytes, failure = 0, None
        stream = buckets(_to_main(placement), self._bucket_bytes)
        with ThreadPoolExecutor(max_workers=1) as pool:
            for heads, bucket in stream:
                nbytes += bucket.numel()
                if failure is None:  # after one the others' tensors still have to be taken from them
                    failure = self._send_bucket(heads, bucket, version, pool)
        return nbytes, failure

    def _send_bucket(
        self, heads: list[TensorHead], bucket: torch.Tensor, version: int, pool: ThreadPoolExecutor
    ) -> RolloutError | None:
        assert self._joined is not None
        meeting, group = self._joined
        taken = pool.submit(self._servers.everywhere, self._transfer.receive(meeting, heads, version))
        try:
            work = start_broadcast(bucket, group, ROOT)
            while not work.is_completed():
                if taken.done():
                    taken.result()  # a server that refuses never comes to the broadcast
                time.sleep(0.001)
            work.wait()
            taken.result()
        except RolloutError as error:
            self._joined = None
            return error
        except RuntimeError as error:  # of gloo or NCCL: a server is gone, and the group with it
            self._joined = None
            return RolloutError(f"the broadcast of weights broke off ({error}); restart the servers that are gone")
        return None


def _to_main(placement: Placement) -> Iterator[tuple[str, torch.Tensor]]:
    for joined in placement.joined:
        yield from placement.fetch(joined, MAIN)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
