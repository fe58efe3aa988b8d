"""How servers are told of weights that a broadcast brings: requests and no I/O, as `Dialect` is for the rest.

vLLM 0.32: docs.vllm.ai, "Weight transfer", with our engine for it (`worker.BroadcastEngine`), which takes buckets over
torch.distributed on any device. SGLang: its `update_weights_from_distributed` with `flattened_bucket`, which takes the
same buckets; no SGLang has been tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_moe.rollout.servers.buckets import TensorHead
from gspo_moe.rollout.servers.records import Post

TIMEOUT_SECONDS = 120.0  # until all have come, and for a bucket
# Our worker extension's method: vLLM calls an update over only where each of its parts came.
ABANDON = Post("/collective_rpc", {"method": "abandon_update"}, seconds=2 * TIMEOUT_SECONDS, or_out=True)


@dataclass(frozen=True)
class Meeting:
    """Where the trainer waits for all workers of all servers. world_size: they and the trainer, which is rank 0."""

    address: str
    port: int
    world_size: int
    backend: str
    timeout_seconds: float

    @property
    def name(self) -> str:
        """Of the group; another one after it broke, as torch takes no name twice."""
        return f"gspo_moe_weights_{self.port}"

    @property
    def patience(self) -> float:
        """Seconds for an answer: workers leave a broken group by their own limit before."""
        return 2 * self.timeout_seconds


class Transfer(Protocol):
    """Of one kind of server."""

    def workers(self) -> Post: ...

    def worker_count(self, body: Any) -> int:
        """How many workers that answer tells of, each a rank."""
        ...

    def join(self, meeting: Meeting, rank_offset: int) -> Post:
        """Answered when all are there. rank_offset: of the server's first worker."""
        ...

    def begin(self) -> tuple[Post, ...]: ...

    def receive(self, meeting: Meeting, heads: Sequence[TensorHead], version: int) -> Post:
        """Answered when the bucket that is broadcast meanwhile is in the model."""
        ...

    def finish(self, version: int) -> tuple[Post, ...]: ...

    def abandon(self) -> tuple[Post, ...]:
        """Ends an update that broke off, where one did, so that another can begin."""
        ...


class VllmTransfer:
    def workers(self) -> Post:
        return Post("/get_world_size")

    def worker_count(self, body: Any) -> int:
        return int(body["world_size"])

    def join(self, meeting: Meeting, rank_offset: int) -> Post:
        info = {
            "address": meeting.address,
            "port": meeting.port,
            "world_size": meeting.world_size,
            "rank_offset": rank_offset,
            "group_name": meeting.name,
            "backend": meeting.backend,
            "timeout_seconds": meeting.timeout_seconds,
        }
        return Post("/init_weight_transfer_engine", {"init_info": info}, seconds=meeting.patience)

    def begin(self) -> tuple[Post, ...]:
        return (Post("/start_weight_update", {}),)

    def receive(self, meeting: Meeting, heads: Sequence[TensorHead], version: int) -> Post:
        return Post("/update_weights", {"update_info": _listed(heads)}, seconds=meeting.patience)

    def finish(self, version: int) -> tuple[Post, ...]:
        return (Post("/finish_weight_update", {"weight_version": str(version)}),)

    def abandon(self) -> tuple[Post, ...]:
        return (ABANDON,)


class SglangTransfer:
    def workers(self) -> Post:
        return Post("/server_info")

    def worker_count(self, body: Any) -> int:
        return int(body["tp_size"])

    def join(self, meeting: Meeting, rank_offset: int) -> Post:
        return Post(
            "/init_weights_update_group",
            {
                "master_address": meeting.address,
                "master_port": meeting.port,
                "rank_offset": rank_offset,
                "world_size": meeting.world_size,
                "group_name": meeting.name,
                "backend": meeting.backend,
            },
            seconds=meeting.patience,
        )

    def begin(self) -> tuple[Post, ...]:
        return ()

    def receive(self, meeting: Meeting, heads: Sequence[TensorHead], version: int) -> Post:
        wanted = {"group_name": meeting.name, "load_format": "flattened_bucket", "flush_cache": False}
        body = {**_listed(heads), **wanted, "weight_version": str(version)}
        return Post("/update_weights_from_distributed", body, seconds=meeting.patience)

    def finish(self, version: int) -> tuple[Post, ...]:
        return (Post("/flush_cache", {}),)

    def abandon(self) -> tuple[Post, ...]:
        return ()


def _listed(heads: Sequence[TensorHead]) -> dict[str, Any]:
    return {
        "names": [head.name for head in heads],
        "dtypes": [head.dtype for head in heads],
        "shapes": [list(head.shape) for head in heads],
    }
