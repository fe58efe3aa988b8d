"""What checksums cost a save and a load: CPU seconds of either, and of the checksums in it, in one process, as JSON.

    python tools/benchmark_checksums.py [--config CONFIG.yaml] [section.key=value ...] [--runs 5] [--steps 1]

Of each figure the least of the runs. `of a step`: what the checksums of a save cost, spread over the steps between two
saves, against the CPU seconds of a step. Default: the quickstart with `model: tiny`; its `checkpoint.interval` counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder

from tools.benchmark_start import DEFAULT, TINY


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what checksums cost a save and a load.")
    parser.add_argument("--config", help="default: the quickstart's, with random weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="measured steps, after one that is not; 0 for none")
    options = parser.parse_args()
    overrides = [*(() if options.config else ("parallel.expert=1", *TINY)), *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options.config or str(DEFAULT), [*overrides, f"logging.run_dir={folder}"], options)
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}, indent=1))
    return 0


def measure(config_path: str, overrides: list[str], options: argparse.Namespace) -> dict[str, float]:
    from gspo_moe.cli import load_config
    from gspo_moe.parallel.groups import shut_down
    from gspo_moe.training import checkpoint, loop, resuming, session
    from gspo_moe.training.preflight import preflight

    config = load_config(config_path, overrides)
    opened = session.open_session(preflight(config))
    trainer = resuming.open_trainer(opened)
    place = Path(config.logging.run_dir) / "measured"

    saved = place / "step_00000001"

    def save() -> object:
        progress = replace(trainer.progress, step=1)
        return checkpoint.save_checkpoint(place, opened.model, trainer.optimizer, progress, keep=1)

    def load() -> object:
        return checkpoint.load_checkpoint(saved, opened.model, trainer.optimizer)

    save()
    load()  # which import what they need
    found: dict[str, list[float]] = {}
    for _ in range(options.runs):
        for name, work in (("save", save), ("load", load)):
            with summing() as spent:
                found.setdefault(name, []).append(cpu(work))
            found.setdefault(f"checksums of a {name}", []).append(sum(spent))
    figures = {name: min(values) for name, values in found.items()}
    figures["bytes"] = sum(file.stat().st_size for file in saved.iterdir())
    for name in ("save", "load"):
        figures[f"of a {name}"] = figures[f"checksums of a {name}"] / figures[name]
    if options.steps:
        log = loop.RunLog(trainer)
        loop._step(trainer, log)
        figures["step"] = cpu(lambda: [loop._step(trainer, log) for _ in range(options.steps)]) / options.steps
        spread = figures["checksums of a save"] / max(1, config.checkpoint.interval)
        figures["of a step"] = spread / figures["step"]
        log.close()
    opened.close()
    shut_down()
    return figures


def cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


@contextmanager
def summing() -> Iterator[list[float]]:
    """CPU seconds that checksums take inside, piece by piece: as files are written, after that, and before a load."""
    from gspo_moe import manifest
    from gspo_moe.training import checkpoint

    spent: list[float] = []
    crc32, add, check = zlib.crc32, checkpoint.add_manifest, checkpoint.check_checkpoint

    def timed(*arguments: Any) -> int:
        begun = time.thread_time()
        found = crc32(*arguments)
        spent.append(time.thread_time() - begun)
        return found

    def whole(work: Callable[..., None]) -> Callable[..., None]:
        """Of all threads; what they sum inside counts once."""

        def run(*arguments: Any, **more: Any) -> None:
            before = len(spent)
            used = cpu(lambda: work(*arguments, **more))
            spent[before:] = [used]

        return run

    with (
        mock.patch.object(manifest, "zlib", SimpleNamespace(crc32=timed)),
        mock.patch.object(checkpoint, "add_manifest", whole(add)),
        mock.patch.object(checkpoint, "check_checkpoint", whole(check)),
    ):
        yield spent


if __name__ == "__main__":
    raise SystemExit(main())
