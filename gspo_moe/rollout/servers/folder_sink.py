"""New weights for servers as an HF folder that they see too; no process holds more than two of its files.

Every file is written by one of the processes that hold most of it; which tensors lie in which file hangs on the model
alone, so all layouts write the same bytes. Servers go on generating while the folder is written.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_moe.errors import RolloutError
from gspo_moe.files import replace_folder, stage, stage_folder
from gspo_moe.model.build import Model
from gspo_moe.model.hf import file_name, save_tensors, write_config, write_index
from gspo_moe.model.placement import Joined, Placement, in_runs
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.rollout.servers.labels import policy_version
from gspo_moe.rollout.servers.probe import Probe
from gspo_moe.rollout.servers.records import Dialect, Servers
from gspo_moe.rollout.servers.syncing import MAIN, load_everywhere, on_main

FILE_BYTES = 1_000_000_000
KEPT = 2  # the newest, and the one that servers may still be reading
_NAME = re.compile(r"version-(\d{8})")


class FolderSink:
    """A WeightSink. servers: used on the first rank alone. shared: a folder that all processes and servers see."""

    def __init__(
        self, servers: Servers, dialect: Dialect, shared: Path, probe: Probe, file_bytes: int = FILE_BYTES
    ) -> None:
        self._servers, self._dialect, self._probe = servers, dialect, probe
        self._shared = shared
        self._file_bytes = file_bytes

    def publish(self, model: Model, version: int) -> dict[str, float]:
        """Metrics of the sync. Raises RolloutError where the folder cannot be written, a server does not take it, or
        does not hold these weights afterwards. Collective.
        """
        start = time.perf_counter()
        folder = self._shared / f"version-{policy_version(version):08d}"
        nbytes = write_folder(model, folder, self._file_bytes)

        def push() -> None:
            self._servers.begin_sync()
            self._servers.everywhere(self._dialect.pause())
            load_everywhere(self._servers, self._dialect, str(folder), version)
            self._servers.everywhere(self._dialect.resume())
            prune(self._shared, folder)

        on_main(push)
        difference = self._probe.check(model, version)
        seconds = time.perf_counter() - start
        return {"sync/seconds": seconds, "sync/bytes": float(nbytes), "sync/probe_difference": difference}


def prune(shared: Path, newest: Path) -> None:
    """Keeps `newest` and the one before; those behind it are of a past that did not last."""
    found = sorted(path for path in shared.iterdir() if _NAME.fullmatch(path.name))
    kept = [path for path in found if path <= newest][-KEPT:]
    for path in [*(path for path in found if path not in kept), *shared.glob(".version-*")]:
        shutil.rmtree(path, ignore_errors=True)


@torch.no_grad()
def write_folder(model: Model, folder: Path, file_bytes: int = FILE_BYTES) -> int:
    """Writes safetensors in the parameters' dtype and config.json; the bytes of weights. Collective.

    The folder takes its name once it is whole, in the place of an earlier one. Raises RolloutError where it cannot be
    written.
    """
    placement = Placement(model)
    files = in_runs(placement.joined, file_bytes)
    partial = stage(folder)
    on_main(lambda: _attempt(folder, lambda: stage_folder(folder)))
    _raise_together(folder, _write_files(placement, files, partial))
    total = sum(joined.nbytes for joined in placement.joined)

    def finish() -> None:
        write_index(partial, [[name for joined in file for name in joined.names] for file in files], total)
        write_config(partial, model.architecture, model.config.params_dtype)
        replace_folder(partial, folder)

    on_main(lambda: _attempt(folder, finish))
    return total


def writers(files: Sequence[Sequence[Joined]]) -> list[int]:
    """The rank that writes each file: of those that hold most of it, the one with the least to write so far."""
    load: dict[int, int] = {}
    chosen = []
    for file in files:
        held: dict[int, float] = {}
        for joined in file:
            for holders in joined.holders:
                for rank in holders:
                    held[rank] = held.get(rank, 0.0) + joined.nbytes / len(joined.holders)
        most = max(held.values())
        writer = min((rank for rank in held if held[rank] == most), key=lambda rank: (load.get(rank, 0), rank))
        load[writer] = load.get(writer, 0) + sum(joined.nbytes for joined in file)
        chosen.append(writer)
    return chosen


def _write_files(placement: Placement, files: Sequence[Sequence[Joined]], folder: Path) -> list[str]:
    """Writes this rank's files, each while the next one's tensors come; what went wrong. Collective."""
    problems: list[str] = []
    running: Future[None] | None = None

    def wait() -> None:
        if running is not None:
            try:
                running.result()
            except Exception as error:  # safetensors' own kind among them
                problems.append(str(error))

    with ThreadPoolExecutor(max_workers=1) as pool:
        for number, (file, writer) in enumerate(zip(files, writers(files), strict=True)):
            tensors = {
                name: tensor.cpu().contiguous() for joined in file for name, tensor in placement.fetch(joined, writer)
            }
            if tensors:
                wait()
                running = pool.submit(save_tensors, tensors, folder / file_name(number, len(files)))
        wait()
    return problems


def _attempt(folder: Path, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        raise _unwritable(folder, str(error)) from error


def _raise_together(folder: Path, problems: list[str]) -> None:
    found = [problem for part in gather_objects(problems) for problem in part]
    if found:
        if dist.get_rank() == MAIN:
            shutil.rmtree(stage(folder), ignore_errors=True)
        raise _unwritable(folder, found[0])


def _unwritable(folder: Path, reason: str) -> RolloutError:
    return RolloutError(
        f"{folder} cannot be written ({reason}); it needs room for three copies of the weights, on a disk that all "
        "processes of the trainer and all servers see"
    )
