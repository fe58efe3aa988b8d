"""What the command line shows of a run at its end: first and last figures, the picture, and what its folder has."""

from __future__ import annotations

from rich.console import Console

from gspo_moe.config.schema import Config
from gspo_moe.observability import load_run
from gspo_moe.observability.summary import summary_table
from gspo_moe.report.curves import draw_curves


def show_run(config: Config) -> None:
    run = load_run(config.run_path)
    first = {name: float(run.values(name)[0]) for name in run.names}
    last = {name: float(run.values(name)[-1]) for name in run.names}
    Console(width=100).print(summary_table(first, last, last))
    picture = draw_curves(config.run_path)
    export = "hf/, " if config.checkpoint.export_hf else ""
    kept = "checkpoints/, " if config.checkpoint.keep else ""
    print(f"{config.run_path}: config.yaml, metrics.jsonl, tensorboard/, samples.jsonl, {kept}{export}{picture.name}")
