"""Checkpoints under faults of the disk and of the processes that write them: real processes, a real full disk."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_moe.config.checkpoints import checkpoints, newest_checkpoint, unfinished_checkpoints
from gspo_moe.manifest import read_manifest
from tests.e2e.conftest import FinishedRun
from tests.e2e.program import ROOT, SMALL_RL, Program, gspo_moe, json_lines, metrics_by_step, succeed

LAST = "step_00000008"
OFTEN = ("checkpoint={interval: 1, keep: 1, background: true, export_hf: false}", "logging.progress=false")


def mounted(folder: Path, *how: str) -> bool:
    return subprocess.run(["mount", *how, str(folder)], check=False, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, "-t", "tmpfs", "-o", "size=24m", "none"):
        pytest.skip("a full disk takes the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(file: Path) -> None:
    """Takes all the room there is."""
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while opened.write(bytes(1 << 16)):
            pass


def command_of(one_process: FinishedRun, run: Path, *more: str) -> list[str | Path]:
    """The same run elsewhere, with a checkpoint a step."""
    config = one_process.path.parent / "config.yaml"
    model = f"model.hf={one_process.path.parent / 'model'}"
    return gspo_moe("train", config, model, f"logging.run_dir={run}", *SMALL_RL, *OFTEN, *more)


def state_of(run: Path) -> tuple[int, ...]:
    """The checksums of the last step's weights, optimizer and generators."""
    manifest = read_manifest(run / "checkpoints" / LAST)
    assert manifest is not None
    return manifest.files["__0_0.distcp"].blocks


def is_the_same(run: Path, expected: Path) -> None:
    """Every figure once, and the last state, to the bit."""
    steps = [record["step"] for record in json_lines(run / "metrics.jsonl") if "reward/mean" in record]
    assert steps == list(range(1, 9))
    found = metrics_by_step(run)
    for figures in found.values():
        figures.pop("checkpoint/failures", None)
    assert found == metrics_by_step(expected)
    assert state_of(run) == state_of(expected)


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_checkpoints(
    one_process: FinishedRun, small_disk: Path, tmp_path: Path
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    program = Program(command_of(one_process, run), tmp_path)
    program.wait_for(lambda: newest_checkpoint(run / "checkpoints") is not None)
    fill(filler)
    program.wait_for(lambda: "the run goes on" in program.stderr)
    filler.unlink()
    outcome = program.finish()
    assert outcome.code == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "could not be written ([Errno 28] No space left on device); the run goes on, and " in outcome.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == [LAST]
    failures = [one["checkpoint/failures"] for one in json_lines(run / "metrics.jsonl") if "checkpoint/failures" in one]
    assert failures == list(range(1, len(failures) + 1))
    assert failures
    is_the_same(run, one_process.path)


@pytest.mark.slow
def test_a_kill_while_it_writes_leaves_the_checkpoint_before(one_process: FinishedRun, tmp_path: Path) -> None:
    """Each attempt gets one checkpoint further and is killed in the next one, but for the last."""
    draw, run, hits = random.Random(0), tmp_path / "run", 0
    command, folder = command_of(one_process, run), run / "checkpoints"
    for step in range(1, 7):
        program, begun = Program(command, tmp_path), time.monotonic()
        while not any(path.name > f"step_{step:08d}.partial" for path in unfinished_checkpoints(folder)):
            assert time.monotonic() < begun + 100, program.stderr
            time.sleep(1e-4)
        time.sleep(draw.random() * 0.01)
        program.kill()
        hits += bool(unfinished_checkpoints(folder))
        assert [path for path in checkpoints(folder) if read_manifest(path) is None] == []
        newest = newest_checkpoint(folder)
        assert newest is not None
        assert newest.name >= f"step_{step:08d}"
    assert hits > 0
    succeed(command, tmp_path)
    is_the_same(run, one_process.path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["moved", "read-only"])
def test_a_run_folder_that_is_lost_ends_the_run_and_the_last_step_is_saved_beside_it(
    fault: str, quickstart: FinishedRun, tmp_path: Path
) -> None:
    run, rescued = tmp_path / "run", tmp_path / "run.rescued"
    model = f"model.hf={quickstart.path / 'cold_start' / 'hf'}"
    launcher: list[str | Path] = ["bash", ROOT / "launch" / "torchrun.sh", "--nproc-per-node", "2", "--"]
    config = ROOT / "examples" / "quickstart.yaml"
    command = [*launcher, "train", config, model, f"logging.run_dir={run}", *SMALL_RL, "logging.progress=false"]
    program = Program(command, tmp_path)
    program.wait_for(lambda: newest_checkpoint(run / "checkpoints") is not None)
    saved = run / "checkpoints"
    if fault == "moved":
        run.rename(tmp_path / "moved")
        why = f"{run} is gone: it was removed, moved or unmounted."
    else:
        if not (mounted(saved, "--bind", str(saved)) and mounted(saved, "-o", "remount,bind,ro")):
            program.kill()
            pytest.skip("a read-only folder takes the right to mount one")
        why = "[Errno 30] Read-only file system"
    outcome = program.finish()
    if fault == "read-only":
        subprocess.run(["umount", str(saved)], check=True)
    assert (outcome.code, outcome.left_behind) == (2, ()), outcome.stderr
    *_, said = outcome.stderr.splitlines()
    assert said.startswith("gspo-moe: OutputError: ")
    assert why in said
    (step,) = rescued.iterdir()
    assert said.endswith(f"{step} holds its last whole step: move that to {saved} and start the same command to go on")
    saved.mkdir(parents=True, exist_ok=True)
    shutil.move(step, saved)
    succeed(command, tmp_path)
    for rank in range(2):
        name = Path("checkpoints") / LAST / f"__{rank}_0.distcp"
        assert (run / name).read_bytes() == (quickstart.path / name).read_bytes()
