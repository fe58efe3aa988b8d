"""New weights for vLLM servers on the trainer's own GPUs, each bucket in a buffer that they open by CUDA IPC.

After vLLM 0.32's documented `ipc` weight transfer (`--weight-transfer-config '{"backend": "ipc"}'`, and
VLLM_ALLOW_INSECURE_SERIALIZATION=1 in the servers' environment), packed. The buffer is exported once and kept: torch
takes an exported one back only where it was opened as often as it was exported, and a GPU may have no server.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from gspo_moe.model.build import Model
from gspo_moe.model.placement import Joined, Placement, in_runs
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.rollout.servers.broadcast_sink import BUCKET_BYTES
from gspo_moe.rollout.servers.buckets import TensorHead, flat
from gspo_moe.rollout.servers.probe import Probe
from gspo_moe.rollout.servers.records import Dialect, Post, Servers
from gspo_moe.rollout.servers.syncing import MAIN, on_main
from gspo_moe.rollout.servers.transfers import ABANDON

Export = Callable[[torch.Tensor], dict[str, Any]]


def export_cuda(buffer: torch.Tensor) -> dict[str, Any]:
    """What another process on the same GPU opens the buffer with, by the GPU's name."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): arguments}


class IpcSink:
    """A WeightSink. servers: used on the first rank alone; each of their GPUs is one of the trainer's, too."""

    def __init__(
        self,
        servers: Servers,
        dialect: Dialect,
        probe: Probe,
        bucket_bytes: int = BUCKET_BYTES,
        export: Export = export_cuda,
    ) -> None:
        self._servers, self._dialect, self._probe = servers, dialect, probe
        self._bucket_bytes, self._export = bucket_bytes, export
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._handles: dict[str, Any] = {}

    @torch.no_grad()
    def publish(self, model: Model, version: int) -> dict[str, float]:
        """Metrics of the sync. Collective. Raises RolloutError as the other sinks do."""
        start = time.perf_counter()
        placement = Placement(model)
        on_main(self._begin)
        nbytes = self._send(placement)

        def finish() -> None:
            self._servers.everywhere(Post("/finish_weight_update", {"weight_version": str(version)}))
            self._servers.everywhere(self._dialect.resume())

        on_main(finish)
        difference = self._probe.check(model, version)
        seconds = time.perf_counter() - start
        return {"sync/seconds": seconds, "sync/bytes": float(nbytes), "sync/probe_difference": difference}

    def _begin(self) -> None:
        self._servers.begin_sync()
        self._servers.everywhere(ABANDON)  # what was begun and never ended, perhaps by a run that was killed
        self._servers.everywhere(Post("/init_weight_transfer_engine", {"init_info": {"packed": True}}))
        self._servers.everywhere(self._dialect.pause())
        self._servers.everywhere(Post("/start_weight_update", {}))

    def _send(self, placement: Placement) -> int:
        """The bytes sent. Collective."""
        runs = in_runs(placement.joined, self._bucket_bytes)
        self._make_room(max(sum(joined.nbytes for joined in run) for run in runs), placement.device)
        for run in runs:
            heads = _heads(run)
            bucket = self._buffer[: sum(head.nbytes for head in heads)]
            tensors = [tensor for joined in run for _, tensor in placement.fetch(joined, MAIN)]
            if tensors:
                bucket.copy_(flat(tensors))
            dist.broadcast(bucket, src=MAIN)
            if bucket.is_cuda:
                torch.cuda.synchronize()
            dist.barrier()  # servers read any rank's buffer
            on_main(partial(self._servers.everywhere, _update(heads, self._handles)))
        return sum(joined.nbytes for joined in placement.joined)

    def _make_room(self, size: int, device: torch.device) -> None:
        """A buffer of at least so many bytes, and everyone's handles of it. Collective."""
        if self._buffer.numel() >= size:
            return
        with _memory_to_share():
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._handles = {}
        for exported in gather_objects(self._export(self._buffer)):
            self._handles |= exported


@contextlib.contextmanager
def _memory_to_share() -> Iterator[None]:
    """What is allocated here lies in no expandable segment, which opens only where a process may look into this one."""
    settings = f"{os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')},{os.environ.get('PYTORCH_ALLOC_CONF', '')}"
    if "expandable_segments:true" not in settings.lower().replace(" ", ""):
        yield
        return
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _heads(run: Sequence[Joined]) -> list[TensorHead]:
    return [
        TensorHead(name, str(joined.dtype).removeprefix("torch."), shape)
        for joined in run
        for name, shape in zip(joined.names, joined.entry.hf_shapes, strict=True)
    ]


def _update(heads: Sequence[TensorHead], handles: dict[str, Any]) -> Post:
    info = {
        "names": [head.name for head in heads],
        "dtype_names": [head.dtype for head in heads],
        "shapes": [list(head.shape) for head in heads],
        "tensor_sizes": [head.nbytes for head in heads],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
    return Post("/update_weights", {"update_info": info})
