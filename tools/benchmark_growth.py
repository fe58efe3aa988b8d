"""How a step's time, memory and messages grow with its sizes, each beside the order that it should have.

    python tools/benchmark_growth.py [--curves sequence batch ...] [--json FILE] [--figure PNG]

Each point is a run of `benchmark_throughput.py` on the model of tools/peers.yaml, smaller, with one size changed. The
exponent is fitted to the upper points of CPU seconds; it may be at most the size's order (1; 0 for experts, of which a
token sees as many as before; that of the counted operations where it is larger; the parameters' for the update; 1 for
memory, 0 for what a process sends) and 0.2 more. Exit code 1 where one is larger.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.errors import GspoMoeError
from tools.growth import CPU_SECONDS, CURVES, MEMORY, Curve, Fit, fits, point_figures
from tools.peer_cases import PEERS, PROMPT_TOKENS
from tools.sides import processor, python_script, run_side, torchrun_script

USER_ERROR = 2
SMALLER = (
    "rollout.max_response_tokens=32",
    "rollout.samples_per_prompt=4",
    "schedule.micro_batch_tokens=2304",
    "algorithm.mini_batches=2",
)
# Okabe and Ito's palette, safe for colour-blind readers.
COLORS = {"rollout": "#0072B2", "old_log_probs": "#009E73", "forward_backward": "#D55E00", "update": "#CC79A7"}


def main() -> int:
    options = parse_arguments()
    found: dict[str, Any] = {"benchmark": "growth", "conditions": {}, "curves": {}}
    try:
        for name in options.curves:
            found["curves"][name] = measure(name, CURVES[name], options.steps, found["conditions"])
    except GspoMoeError as error:
        print(f"benchmark_growth: {type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.figure is not None:
        draw(found["curves"], options.figure)
    return int(not all(fit["holds"] for curve in found["curves"].values() for fit in curve["fits"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--steps", type=int, default=2, help="steps to measure at each point (2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="PNG")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def measure(name: str, curve: Curve, steps: int, conditions: dict[str, Any]) -> dict[str, Any]:
    """One curve for the file of results; writes down the conditions. Raises TrainingError where a run fails."""
    runs, points = [], []
    for size, overrides in curve.points.items():
        arguments = [str(PEERS), *SMALLER, *overrides, "--synthetic", str(PROMPT_TOKENS)]
        label, script = f"{name} {size}", "benchmark_throughput.py"
        if curve.processes:
            arguments += ["--warmup", "0", "--steps", "1", "--messages"]
            outcome = run_side(torchrun_script(label, sys.executable, arguments, size, script))
        else:
            arguments += ["--warmup", "1", "--steps", str(steps)]
            outcome = run_side(python_script(label, sys.executable, arguments, 1, script))
        runs.append(outcome.figures)
        points.append(point_figures(outcome.figures, outcome.together_gib, curve.processes))
        print(f"{curve.of} {size}: " + ", ".join(f"{key} {value:.4g}" for key, value in points[-1].items()), flush=True)
    conditions |= {"processor": processor(), "cores": os.cpu_count(), "sizes": list(SMALLER)}
    conditions |= {key: runs[0][key] for key in ("torch", "megatron_core", "dtype")}
    sizes = list(curve.points)
    found = fits(curve, sizes, runs, points)
    show(curve, found)
    return {
        "of": curve.of,
        "sizes": sizes,
        "figures": {figure: [point[figure] for point in points] for figure in points[0]},
        "fits": [
            {"figure": fit.figure, "exponent": fit.exponent, "expected": fit.expected, "holds": fit.holds}
            for fit in found
        ],
    }


def show(curve: Curve, found: list[Fit]) -> None:
    for fit in found:
        answer = "holds" if fit.holds else "GROWS FASTER"
        print(f"  {fit.figure:<30} ~ {curve.of} ^ {fit.exponent:5.2f}, expected at most {fit.expected:.2f}: {answer}")


def draw(curves: dict[str, Any], target: Path) -> None:
    """Seconds of each phase against each size, and what they should at most be from the last points on."""
    timed = {name: curve for name, curve in curves.items() if MEMORY in curve["figures"]}
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 3).flat)
    memory = axes[-1]
    for axis, color, (name, curve) in zip(axes, (*COLORS.values(), "#E69F00"), timed.items(), strict=False):
        _seconds(axis, curve)
        relative = [size / curve["sizes"][0] for size in curve["sizes"]]
        memory.plot(relative, curve["figures"][MEMORY], "o-", color=color, ms=3, lw=1.2, label=name)
    memory.set(title="peak memory, GiB", xlabel="size over the smallest", xscale="log", ylim=(0, None))
    _plain(memory, sorted({size // curve["sizes"][0] for curve in timed.values() for size in curve["sizes"]}))
    figure.savefig(target, dpi=110)
    print(target)


def _seconds(axis: Axes, curve: dict[str, Any]) -> None:
    expected = {fit["figure"]: fit["expected"] for fit in curve["fits"]}
    sizes = curve["sizes"]
    for phase, color in COLORS.items():
        name = f"{phase}_{CPU_SECONDS}"
        values = curve["figures"][name]
        axis.plot(sizes, values, "o-", color=color, ms=3, lw=1.2, label=phase.replace("_", " "))
        line = [values[-1] * (size / sizes[-1]) ** expected[name] for size in sizes[-3:]]
        axis.plot(sizes[-3:], line, "--", color=color, lw=0.8)
    axis.set(title="CPU seconds a step", xlabel=curve["of"], xscale="log", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    _plain(axis, sizes)


def _plain(axis: Axes, sizes: list[int]) -> None:
    """Ticks at the sizes themselves, as plain numbers."""
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    sys.exit(main())
