"""The folder sink: what servers are told, in which order, and what stands on the disk meanwhile."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from gspo_moe.errors import RolloutError
from gspo_moe.model.names import Entry
from gspo_moe.model.placement import Joined, in_runs
from gspo_moe.model.weights import RandomSource, SafetensorsSource
from gspo_moe.rollout.servers.folder_sink import FolderSink, prune, write_folder, writers
from gspo_moe.rollout.servers.records import Post, ServerDown
from tests.qwen3 import architecture, built, layout
from tests.servers import NoProbe, PlainDialect, Servers

SIZES = architecture()


def sink(servers: Servers, shared: Path) -> FolderSink:
    return FolderSink(servers, PlainDialect(), shared, NoProbe(), file_bytes=30_000)  # type: ignore[arg-type]


def test_servers_take_each_whole_version_while_they_pause(tmp_path: Path) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def handle(number: int, post: Post) -> None:
        if post.path == "/load":
            assert post.body is not None
            source = SafetensorsSource(post.body["folder"])
            seen.append((post.body["version"], source.get("lm_head.weight")))

    servers = Servers(handle, 2)
    for version in range(4):
        with built(SIZES, layout(), RandomSource(SIZES, seed=version)) as model:
            figures = sink(servers, tmp_path).publish(model, version)
            parameters = sum(p.numel() * 4 for chunk in model.chunks for p in chunk.parameters())
            assert figures["sync/bytes"] == parameters
            assert figures["sync/seconds"] > 0
    assert servers.posts == ["/pause", "/load", "/label", "/resume"] * 4
    assert [version for version, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(torch.equal(head, RandomSource(SIZES, version).get("lm_head.weight")) for version, head in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-00000002", "version-00000003"]


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    source = RandomSource(SIZES, seed=5)
    with built(SIZES, layout(), source) as model:
        write_folder(model, tmp_path / "folder", file_bytes=30_000)
    read = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(read.model.layers[1].mlp.gate.weight, source.get("model.layers.1.mlp.gate.weight"))
    fused = read.model.layers[0].mlp.experts.down_proj[3]
    assert torch.equal(fused, source.get("model.layers.0.mlp.experts.3.down_proj.weight"))


def test_a_folder_that_cannot_be_written_ends_the_run_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gspo_moe.rollout.servers.folder_sink.save_tensors", full)
    servers = Servers(lambda number, post: None)
    with (
        built(SIZES, layout(), RandomSource(SIZES, seed=1)) as model,
        pytest.raises(RolloutError, match=r"version-00000003 cannot be written \(.*No space.*three copies"),
    ):
        sink(servers, tmp_path).publish(model, 3)
    assert list(tmp_path.iterdir()) == []
    assert servers.posts == []


def test_a_server_that_refuses_ends_the_run(tmp_path: Path) -> None:
    def handle(number: int, post: Post) -> None:
        if post.path == "/load":
            raise ServerDown("http://x cannot be reached")

    with (
        built(SIZES, layout(), RandomSource(SIZES, seed=1)) as model,
        pytest.raises(ServerDown, match="cannot be reached"),
    ):
        sink(Servers(handle), tmp_path).publish(model, 3)


@pytest.mark.parametrize(("newest", "kept"), [(10, [9, 10]), (2, [2])])
def test_pruning_keeps_the_newest_the_one_before_and_what_is_not_ours(
    tmp_path: Path, newest: int, kept: list[int]
) -> None:
    for name in ("version-00000002", "version-00000010", "version-00000009", ".version-00000003.partial", "notes"):
        (tmp_path / name).mkdir()
    prune(tmp_path, tmp_path / f"version-{newest:08d}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *(f"version-{each:08d}" for each in kept)]


def joined(number: int, holders: tuple[tuple[int, ...], ...]) -> Joined:
    entry = Entry((str(number),), ((len(holders), 25),), 0, 0, len(holders), 1)
    return Joined(entry, torch.float32, holders)


def test_files_are_cut_by_size_alone_and_written_by_who_holds_most() -> None:
    everywhere, halves, second = ((0, 1, 2, 3),), ((0, 2), (1, 3)), ((2, 3),)
    tensors = [joined(n, holders) for n, holders in enumerate([everywhere, everywhere, halves, second, second, halves])]
    files = in_runs(tensors, max_bytes=200)
    assert [[one.names[0] for one in file] for file in files] == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    assert writers(files) == [0, 1, 2, 3]  # of equals, the one with the least to write so far
