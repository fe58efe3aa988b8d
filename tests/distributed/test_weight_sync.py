"""Weights on their way to servers are the same from every layout: as files byte for byte, by broadcast bit for bit."""

import base64
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_moe.model.weights import RandomSource
from gspo_moe.rollout.servers.broadcast_sink import BroadcastSink
from gspo_moe.rollout.servers.buckets import TensorHead, empty_bucket, views
from gspo_moe.rollout.servers.folder_sink import write_folder
from gspo_moe.rollout.servers.ipc_sink import IpcSink
from gspo_moe.rollout.servers.records import Post
from gspo_moe.rollout.servers.transfer_group import ROOT, join_transfer_group, start_broadcast
from tests.launch import launch
from tests.qwen3 import architecture, built, layout
from tests.servers import TRANSFER, NoProbe, PlainDialect, Servers

SIZES = architecture(num_hidden_layers=4, vocab_size=61)
LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"tensor": 2, "expert_tensor": 2}, {"pipeline": 2}, {"expert": 2}],
    4: [{"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1}],
}
FILE_BYTES = 30_000


def write(world_size: int, folder: Path) -> None:
    for number, parallel in enumerate(LAYOUTS[world_size]):
        with built(SIZES, layout(world_size, **parallel), RandomSource(SIZES, seed=3)) as model:
            write_folder(model, folder / f"{world_size}-{number}", FILE_BYTES)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_layout_writes_the_same_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for world_size in LAYOUTS:
        launch(write, world_size, world_size, tmp_path)
    expected = contents(tmp_path / "1-0")
    assert len(expected) > 5
    for world_size, layouts in LAYOUTS.items():
        for number, parallel in enumerate(layouts):
            assert contents(tmp_path / f"{world_size}-{number}") == expected, parallel
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "1-0").glob("*.safetensors"):
        found |= load_file(file)
        assert file.stat().st_size < FILE_BYTES + 10_000
    source = RandomSource(SIZES, seed=3)
    assert found.keys() == source.shapes().keys()
    assert all(torch.equal(found[name], source.get(name)) for name in found)


def receive(requests: Any, answers: Any) -> None:
    """A server's worker, in a process of its own: does what it is asked and tells what it has got."""
    group, tensors = None, dict[str, torch.Tensor]()
    for path, body in iter(requests.get, None):
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            group = join_transfer_group(
                info["address"],
                info["port"],
                rank=info["rank_offset"],
                world_size=info["world_size"],
                name=info["group_name"],
                backend=info["backend"],
                timeout_seconds=info["timeout_seconds"],
            )
        elif path == "/update_weights":
            parts = zip(*(body["update_info"][key] for key in ("names", "dtypes", "shapes")), strict=True)
            heads = [TensorHead(name, dtype, tuple(shape)) for name, dtype, shape in parts]
            bucket = empty_bucket(heads, torch.device("cpu"))
            assert group is not None
            start_broadcast(bucket, group, ROOT).wait()
            tensors |= zip([head.name for head in heads], views(bucket, heads), strict=True)
        elif path == "/finish_weight_update":
            torch.save({"version": body["weight_version"], "tensors": tensors}, body["weight_version"] + ".pt")
        answers.put({"world_size": 1})


def publish(world_size: int, folder: Path) -> None:
    os.chdir(folder)
    receivers = []
    if int(os.environ["RANK"]) == 0:
        context = multiprocessing.get_context("spawn")
        for _ in range(2):
            queues = context.Queue(), context.Queue()
            process = context.Process(target=receive, args=queues, daemon=True)
            process.start()
            receivers.append((process, *queues))

    def handle(number: int, post: Post) -> Any:
        _, requests, _ = receivers[number]
        requests.put((post.path, post.body))
        return {"world_size": 1}

    class Waiting(Servers):
        def each(self, posts: Any) -> list[Any]:
            super().each(posts)
            return [answers.get(timeout=300) for _, _, answers in receivers]

    servers = Waiting(handle, 2)
    for version, parallel in enumerate(LAYOUTS[world_size]):
        with built(SIZES, layout(world_size, **parallel), RandomSource(SIZES, seed=version)) as model:
            sink = BroadcastSink(servers, PlainDialect(), TRANSFER, NoProbe(), "127.0.0.1", bucket_bytes=20_000)  # type: ignore[arg-type]
            figures = sink.publish(model, version)
            total = sum(torch.Size(shape).numel() for shape in RandomSource(SIZES, 0).shapes().values()) * 4
            assert figures["sync/bytes"] == (total if dist.get_rank() == 0 else 0)
    for process, requests, _ in receivers:
        requests.put(None)
        process.join(30)
    if receivers:
        order = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
        seen = [path for number, path in enumerate(servers.posts) if path != servers.posts[number - 1]]
        assert seen[:8] == ["/collective_rpc", "/get_world_size", "/init_weight_transfer_engine", *order]


def test_a_broadcast_brings_every_server_every_bit(tmp_path: Path) -> None:
    launch(publish, 2, 2, tmp_path)
    for version in range(len(LAYOUTS[2])):
        received = torch.load(tmp_path / f"{version}.pt")
        source = RandomSource(SIZES, seed=version)
        assert received["tensors"].keys() == source.shapes().keys()
        assert all(torch.equal(received["tensors"][name], source.get(name)) for name in source.shapes())


def share(folder: Path) -> None:
    """An IPC sink over two ranks whose buffers are read where they are, as no CPU has handles for them."""
    buffers: list[torch.Tensor] = []
    received: dict[str, torch.Tensor] = {}
    last: list[TensorHead] = []

    def export(buffer: torch.Tensor) -> dict[str, Any]:
        buffers.append(buffer)
        return {f"GPU-{dist.get_rank()}": dist.get_rank()}

    def handle(number: int, post: Post) -> None:
        if post.path == "/update_weights":
            assert post.body is not None
            info = post.body["update_info"]
            assert pickle.loads(base64.b64decode(info["ipc_handles_pickled"])) == {"GPU-0": 0, "GPU-1": 1}
            parts = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
            last[:] = [TensorHead(name, dtype, tuple(shape)) for name, dtype, shape in parts]
            assert info["tensor_sizes"] == [head.nbytes for head in last]
            found = views(buffers[0][: sum(info["tensor_sizes"])].clone(), last)
            received.update(zip(info["names"], found, strict=True))

    servers = Servers(handle)
    with built(SIZES, layout(2, tensor=2, expert_tensor=2), RandomSource(SIZES, seed=1)) as model:
        IpcSink(servers, PlainDialect(), NoProbe(), bucket_bytes=20_000, export=export).publish(model, 3)  # type: ignore[arg-type]
        sizes = [sum(head.nbytes for head in last)]
        dist.broadcast_object_list(sizes, src=0)
        torch.save(buffers[0][: sizes[0]].clone(), folder / f"{dist.get_rank()}.pt")
    if os.environ["RANK"] == "0":
        start = ["/collective_rpc", "/init_weight_transfer_engine", "/pause", "/start_weight_update"]
        assert servers.posts[:4] == start
        assert servers.posts[-2:] == ["/finish_weight_update", "/resume"]
        torch.save(received, folder / "received.pt")


def test_ipc_buffers_hold_every_bit_on_every_rank(tmp_path: Path) -> None:
    launch(share, 2, tmp_path)
    received, source = torch.load(tmp_path / "received.pt"), RandomSource(SIZES, seed=1)
    assert received.keys() == source.shapes().keys()
    assert all(torch.equal(received[name], source.get(name)) for name in source.shapes())
    assert torch.equal(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))
