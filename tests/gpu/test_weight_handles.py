"""Weights by CUDA IPC: another process on the same GPU opens the sink's handles and reads every bit of every bucket."""

from __future__ import annotations

import base64
import contextlib
import multiprocessing
import pickle
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from gspo_moe.model.names import Entry
from gspo_moe.model.placement import Joined
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.platform import device
from gspo_moe.rollout.servers import ipc_sink
from gspo_moe.rollout.servers.buckets import TensorHead, views
from gspo_moe.rollout.servers.ipc_sink import IpcSink
from gspo_moe.rollout.servers.records import Post
from tests.gpu.golden import SIZES, settings, weights
from tests.launch import launch
from tests.qwen3 import Tensors, built, layout
from tests.servers import NoProbe, PlainDialect, Servers

BUCKET_BYTES = 4096
READ_SECONDS = 0.05  # that a reader takes its time, so that a buffer filled too early is seen
GPU = 0


@dataclass(frozen=True)
class Held:
    """What the sink asks of a Placement, of tensors at hand."""

    tensors: dict[str, torch.Tensor]
    device: torch.device

    @property
    def joined(self) -> list[Joined]:
        return [
            Joined(Entry((name,), (tuple(each.shape),), None, 0, 1, 1), each.dtype, ((0,),))
            for name, each in self.tensors.items()
        ]

    def fetch(self, joined: Joined, to: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield joined.names[0], self.tensors[joined.names[0]]


def any_bits(dtype: torch.dtype, *shape: int, seed: int) -> torch.Tensor:
    """Of all values, NaN and infinity among them."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    drawn = torch.randint(limits.min, limits.max, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(integers).view(dtype)


def held_tensors(seed: int, place: torch.device) -> dict[str, torch.Tensor]:
    """Odd sizes, one larger than a bucket, one turned and one with holes, in both dtypes one behind the other."""
    found = dict[str, torch.Tensor]()
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype)
        small = any_bits(dtype, 40, 7, 9, seed=seed).to(place)
        found |= {f"{name}.{number}": each for number, each in enumerate(small)}
        found[f"{name}.larger than a bucket"] = any_bits(dtype, 64, 101, seed=seed + 1).to(place)
        found[f"{name}.turned"] = any_bits(dtype, 30, 17, seed=seed + 2).to(place).t()
        found[f"{name}.holes"] = any_bits(dtype, 33, 12, seed=seed + 3).to(place)[::2, 1:]
    assert sum(not each.is_contiguous() for each in found.values()) == 4
    return found


def opened(handles: dict[str, Any]) -> torch.Tensor:
    """The sender's buffer, by the steps of vLLM 0.32's `packed_ipc_consumer`."""
    arguments = list(handles[str(torch.cuda.get_device_properties(GPU).uuid)])
    arguments[6] = GPU  # its number here
    found: torch.Tensor = rebuild_cuda_tensor(*arguments)
    return found


def receive(rank: int, requests: Any, answers: Any) -> None:
    """A server's worker, in a process of its own: opens the buffer once an update, and copies each bucket out of it."""
    torch.cuda.set_device(GPU)
    buffer: torch.Tensor | None = None
    received = dict[str, torch.Tensor]()
    for path, body in iter(requests.get, None):
        if path == "/update_weights":
            info = body["update_info"]
            if buffer is None:
                buffer = opened(pickle.loads(base64.b64decode(info["ipc_handles_pickled"])))
            time.sleep(READ_SECONDS)
            parts = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
            heads = [TensorHead(name, dtype, tuple(shape)) for name, dtype, shape in parts]
            found = views(buffer[: sum(info["tensor_sizes"])].clone(), heads)
            received |= zip(info["names"], (each.cpu() for each in found), strict=True)
        elif path == "/finish_weight_update":
            buffer = None
            torch.save(received, body["weight_version"] + ".pt")
            received = {}
        answers.put(path)


def publish(folder: Path, of_a_model: bool) -> None:
    context = multiprocessing.get_context("spawn")
    requests, answers = context.Queue(), context.Queue()
    reader = mp.start_processes(receive, (requests, answers), nprocs=1, join=False, start_method="spawn")

    def handle(number: int, post: Post) -> Any:
        path = str(folder / post.body["weight_version"]) if post.path == "/finish_weight_update" and post.body else ""
        requests.put((post.path, {"weight_version": path} if path else post.body))
        assert answer(reader, answers) == post.path

    try:
        send(handle, of_a_model)
        requests.put(None)
        assert reader.join(timeout=60)
    finally:
        reader.processes[0].kill()  # which may be stuck in the driver


def answer(reader: Any, answers: Any) -> str:
    """The reader's next; raises what it raised."""
    for _ in range(60):
        with contextlib.suppress(queue.Empty):
            said: str = answers.get(timeout=1)
            return said
        reader.join(timeout=0)
    raise TimeoutError("the reader neither answers nor ends")


def send(handle: Callable[[int, Post], Any], of_a_model: bool) -> None:
    sink = IpcSink(Servers(handle), PlainDialect(), NoProbe(), BUCKET_BYTES)  # type: ignore[arg-type]
    if of_a_model:
        with built(SIZES, layout(), Tensors(weights()), settings("bf16", "local")) as model:
            sink.publish(model, 1)
    else:
        initialize(layout(), seed=1)
        ipc_sink.Placement = lambda held: held  # type: ignore[assignment, misc]
        for version in (1, 2, 3):  # the buffer of the first holds the others, too
            place = device().torch_device
            sink.publish(Held(held_tensors(version, place), place), version)  # type: ignore[arg-type]
        shut_down()


def check(folder: Path, version: int, expected: dict[str, torch.Tensor]) -> None:
    received = torch.load(folder / f"{version}.pt")
    assert received.keys() == expected.keys()
    for name, tensor in expected.items():
        assert received[name].dtype == tensor.dtype
        assert received[name].shape == tensor.shape
        assert torch.equal(bits(received[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_another_process_reads_every_bit_of_every_bucket(tmp_path: Path) -> None:
    launch(publish, 1, tmp_path, False, seconds=100)
    for version in (1, 2, 3):
        check(tmp_path, version, held_tensors(version, torch.device("cpu")))


def test_a_models_weights_reach_another_process(tmp_path: Path) -> None:
    launch(publish, 1, tmp_path, True, seconds=100)
    check(tmp_path, 1, {name: tensor.bfloat16() for name, tensor in weights().items()})
