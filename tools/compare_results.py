"""What got worse between two result files of benchmark_throughput.py, benchmark_peers.py or benchmark_growth.py.

    python tools/compare_results.py BEFORE.json AFTER.json [--tolerance 0.1]

A figure is worse where its median is by more than the tolerance, its whole spread lies beyond the other's, and, for a
part of a step, the change is more than a hundredth of the step. Exit code 1 with a list of them, 0 where there is none,
2 where the files cannot be compared: another device, version or size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.errors import DataError, GspoMoeError

USER_ERROR = 2
BENCHMARKS = ("throughput", "peers", "growth")
MORE_IS_BETTER = ("second", "tflops", "mfu")  # `second` of tokens_per_second
LESS_IS_BETTER = ("seconds", "gib", "bytes", "messages")
NO_FIGURES = ("conditions", "ratios", "metrics", "profile", "peak_tflops")
# Of a file that does not list its conditions.
THROUGHPUT_CONDITIONS = (
    "device",
    "processes",
    "parallel",
    "dtype",
    "torch",
    "megatron_core",
    "parameters",
    "active_parameters",
    "tokens",
    "rollout_tokens",
    "peak_tflops",
)
STEP_SHARE = 0.01


@dataclass(frozen=True)
class Figure:
    """least and most: its spread, both the median for a single number. whole: of the step it is a part of, or None."""

    least: float
    median: float
    most: float
    more_is_better: bool
    whole: float | None = None


@dataclass(frozen=True)
class Change:
    name: str
    before: Figure
    after: Figure

    def is_worse(self, tolerance: float) -> bool:
        before, after = self.before, self.after
        sign = -1.0 if before.more_is_better else 1.0
        loss = sign * (after.median - before.median)
        apart = after.most < before.least if before.more_is_better else after.least > before.most
        enough = before.whole is None or loss > STEP_SHARE * before.whole
        return loss > tolerance * abs(before.median) and apart and enough

    def __str__(self) -> str:
        before, after = self.before, self.after
        change = f" ({after.median / before.median - 1:+.1%})" if before.median else ""
        spreads = f"{before.least:.6g}-{before.most:.6g} -> {after.least:.6g}-{after.most:.6g}"
        return f"{self.name}: {before.median:.6g} -> {after.median:.6g}{change}, spreads {spreads}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share of a figure that counts as no change (0.1)")
    options = parser.parse_args()
    if options.tolerance < 0:
        parser.error("--tolerance must be at least 0")
    try:
        before, after = read_results(options.before), read_results(options.after)
        check_alike(before, after)
    except GspoMoeError as error:
        print(f"compare_results: {type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    found = changes(before, after)
    for name in sorted(set(figures(before)) ^ set(figures(after))):
        print(f"only in one of the files: {name}")
    worse = [change for change in found if change.is_worse(options.tolerance)]
    print(
        f"{len(worse)} of {len(found)} figures got worse by more than {options.tolerance:.0%} and beyond their spreads"
    )
    for change in worse:
        print(f"  {change}")
    return 1 if worse else 0


def read_results(file: Path) -> dict[str, Any]:
    """Raises DataError for what is no file of results."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as results ({error}); give a file that --json wrote") from None
    if not isinstance(found, dict) or found.get("benchmark") not in BENCHMARKS:
        named = ", ".join(f"benchmark_{name}.py" for name in BENCHMARKS)
        raise DataError(f"{file} is no file of results; give one that --json of {named} wrote")
    return found


def check_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises DataError, with all that differs, for results of different benchmarks, devices, versions or sizes."""
    old, new = dict(_leaves(_conditions(before))), dict(_leaves(_conditions(after)))
    differing = [key for key in (*old, *(set(new) - set(old))) if old.get(key) != new.get(key)]
    if differing:
        lines = [f"  {'.'.join(key)}: {old.get(key)} -> {new.get(key)}" for key in differing]
        raise DataError("\n".join(["the results are of unlike conditions; measure both in the same:", *lines]))


def _conditions(found: Mapping[str, Any]) -> dict[str, Any]:
    listed = found.get("conditions", {key: found.get(key) for key in THROUGHPUT_CONDITIONS})
    return {"benchmark": found["benchmark"], **listed}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Of the figures that both have."""
    old, new = figures(before), figures(after)
    return [Change(name, old[name], new[name]) for name in old if name in new]


def figures(found: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a file by their names, which say whether more or less of them is better."""
    kept = {key: value for key, value in found.items() if key not in NO_FIGURES}
    by_path = {path: figure for path, value in _leaves(kept) if (figure := _figure(path, value)) is not None}
    return {".".join(path): _with_whole(path, figure, by_path) for path, figure in by_path.items()}


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is no mapping, or a spread, with the keys that lead there; items of a list go by their numbers."""
    if isinstance(value, list):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or set(value) == {"min", "median", "max"}:
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*path, key))


def _figure(path: tuple[str, ...], value: Any) -> Figure | None:
    words = {word for key in path for word in key.split("_")}
    more = not words.isdisjoint(MORE_IS_BETTER)
    if not more and words.isdisjoint(LESS_IS_BETTER):
        return None
    if isinstance(value, dict):
        return Figure(value["min"], value["median"], value["max"], more)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return Figure(value, value, value, more)


def _with_whole(path: tuple[str, ...], figure: Figure, by_path: Mapping[tuple[str, ...], Figure]) -> Figure:
    step = by_path.get((*path[:-1], "step"))
    if figure.more_is_better or step is None:
        return figure
    return Figure(figure.least, figure.median, figure.most, figure.more_is_better, step.median)


if __name__ == "__main__":
    sys.exit(main())
