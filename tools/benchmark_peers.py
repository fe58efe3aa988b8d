"""Races our steps against TRL's `GRPOTrainer` (importance_sampling_level="sequence") and transformers' own pieces.

    bash tools/setup_trl.sh                                      # once: a venv with TRL
    python tools/benchmark_peers.py --trl-python .venv-trl/bin/python [--cases m vocabulary long] [--json FILE]
    python tools/benchmark_peers.py --trl-python .venv-trl/bin/python --curves        # do rewards grow alike?

Both sides read the same weights, which are written once, and take the same prompts, answers of the same length, batch,
dtype (fp32), AdamW, learning rate and clips, without a KL term. A case's sides run one after the other, ours and theirs
by turns, in processes of their own, --rounds times; each warms up before it is measured. The first half has one thread
each; then ours has --processes processes of one thread, and the better of TRL on one and on that many threads counts.

TRL as it is best here: no gradient checkpointing, its own fused output layer, transformers' choice of grouped_mm for
the experts, as many answers in a micro-batch as schedule.micro_batch_tokens holds (for both sides), no end token to
forbid, old log-probs left out where a step is one update (its own rule), and the allocator's settings of
launch/torchrun.sh, which take a quarter off its forward + backward. `generate()` counts with the experts'
implementation and the threads with which it is fastest. Memory is the peak of all processes of a side together, from
start to end. Ratios are of medians by the clock; beside them are the least and most of the rounds, and the ratio of
CPU seconds, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.cli import USER_ERROR
from gspo_moe.errors import ConfigError, GspoMoeError
from tools.peer_cases import CASES, Race, sides, sizes, write_weights
from tools.peer_curves import MOST_SEEDS, compare_curves
from tools.peer_figures import Figures, Ratio, figures_of, ratios
from tools.sides import Outcome, processor, run_side


def main() -> int:
    options = parse_arguments()
    warnings.filterwarnings("ignore")  # of megatron-core, where the weights are written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the side that runs ends too
    try:
        found = curves(options) if options.curves else race(options)
    except GspoMoeError as error:
        print(f"benchmark_peers: {type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="Python of the venv that tools/setup_trl.sh makes")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="of all sides (3)")
    parser.add_argument("--steps", type=int, default=2, help="steps to measure in a round (2)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (1)")
    parser.add_argument("--processes", type=int, default=2, help="of ours, and threads of theirs (2)")
    parser.add_argument("--ours", nargs="*", default=[], metavar="section.key=value", help="of ours in processes")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="answers of theirs at a time")
    parser.add_argument("--curves", action="store_true", help="train both on one task instead, from one cold start")
    parser.add_argument("--seeds", type=int, default=3, help="of the curves, each side (3)")
    parser.add_argument("--curve-steps", type=int, default=48, help="of a curve (48)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not 2 <= options.seeds <= MOST_SEEDS or options.curve_steps < 1:
        parser.error(f"--seeds must be 2 to {MOST_SEEDS}, and --curve-steps at least 1")
    if min(options.rounds, options.steps) < 1 or options.warmup < 1 or options.processes < 2:
        parser.error("--rounds, --steps and --warmup must be at least 1, and --processes at least 2")
    return options


def trl_python(options: argparse.Namespace) -> str:
    """Raises ConfigError without a Python of TRL's."""
    if not Path(options.trl_python).is_file():
        raise ConfigError(
            f"--trl-python {options.trl_python} is no file; bash tools/setup_trl.sh makes a venv with TRL"
        )
    return os.path.abspath(options.trl_python)  # not resolved: a venv's python is a link out of it


def curves(options: argparse.Namespace) -> dict[str, Any]:
    """What --json writes with --curves. Raises as `race`."""
    python = trl_python(options)
    with tempfile.TemporaryDirectory() as folder:
        return compare_curves(python, options.seeds, options.curve_steps, Path(folder))


def race(options: argparse.Namespace) -> dict[str, Any]:
    """What --json writes. Raises ConfigError without a Python of TRL's, TrainingError where a side fails."""
    python = trl_python(options)
    plan = Race(python, options.processes, options.warmup, options.steps, tuple(options.ours), options.micro_batch)
    found: dict[str, Any] = {"benchmark": "peers", "conditions": conditions(options), "cases": {}, "ratios": {}}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            rounds = run_rounds(name, plan, Path(folder), options.rounds)
        figures = {side: figures_of(side, outcomes) for side, outcomes in rounds.items()}
        reached = list(ratios(rounds, options.processes, CASES[name].memory_target))
        found["conditions"]["versions"] = versions(rounds)
        found["cases"][name] = figures
        found["ratios"][name] = [{**dataclasses.asdict(ratio), "reached": ratio.reached} for ratio in reached]
        show(name, figures, reached)
    return found


def run_rounds(name: str, plan: Race, folder: Path, count: int) -> dict[str, list[Outcome]]:
    """The outcomes of each side of a case, round by round."""
    entered = sides(plan, write_weights(CASES[name], folder / "hf"))
    rounds: dict[str, list[Outcome]] = {side.name: [] for side in entered}
    for number in range(count):
        for side in entered:
            print(f"{name}, round {number + 1} of {count}: {side.name}", file=sys.stderr, flush=True)
            rounds[side.name].append(run_side(side))
    return rounds


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What figures must have in common to be compared."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "processes": options.processes,
        "cases": {name: sizes(CASES[name]) for name in options.cases},
        "ours": options.ours,
        "micro_batch": options.micro_batch,
    }


def versions(rounds: dict[str, list[Outcome]]) -> dict[str, str]:
    ours, theirs = rounds["ours_1"][0].figures, rounds["trl_1"][0].figures
    return {
        "torch": ours["torch"],
        "megatron_core": ours["megatron_core"],
        "transformers": theirs["transformers"],
        "trl": theirs["trl"],
    }


def show(name: str, figures: dict[str, Figures], reached: list[Ratio]) -> None:
    console = Console(width=120, highlight=False)
    table = Table(box=None, pad_edge=False, title=f"{name}: median (least-most) seconds a step, CPU seconds, GiB")
    for title in ("side", "phase", "wall", "CPU", "GiB together, largest"):
        table.add_column(title)
    for side, found in figures.items():
        for phase, wall in found["wall_seconds"].items():
            memory = "{together[median]:.2f}, {largest[median]:.2f}".format(**found["memory_gib"])
            first = phase == next(iter(found["wall_seconds"]))
            cpu = found["cpu_seconds"][phase]
            table.add_row(side if first else "", phase, _cell(wall), _cell(cpu), memory if first else "")
    console.print(table)
    table = Table(box=None, pad_edge=False, title=f"{name}: ratios")
    for title in ("ours / peer", "peer's best", "wall (least-most)", "CPU", "goal", "reached"):
        table.add_column(title)
    for ratio in reached:
        goal = "" if ratio.target is None else f"{ratio.relation} {ratio.target:g}"
        cpu_ratio = "" if ratio.cpu is None else f"{ratio.cpu:.2f}"
        wall_ratio = f"{ratio.wall:.2f} ({ratio.least:.2f}-{ratio.most:.2f})"
        answer = {True: "yes", False: "NO", None: ""}[ratio.reached]
        table.add_row(ratio.name, ratio.peer, wall_ratio, cpu_ratio, goal, answer)
    console.print(table)


def _cell(found: dict[str, float]) -> str:
    return "{median:.3f} ({min:.3f}-{max:.3f})".format(**found)


if __name__ == "__main__":
    sys.exit(main())
