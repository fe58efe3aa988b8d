"""`gpu_check.sh`'s stages as one report: `gpu_report.py PARTS OUT` writes report.json and report.txt in the folder OUT.

PARTS has what the stages left, any of it may be missing: env.json, kernels.json, slice.json, mismatch.json,
mismatch_fp32.json, baseline.json, quickstart.jsonl, tests.xml, and stages.txt with a line `name exit-code seconds` for
each stage that ran.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Parts = dict[str, Any]
REPEATED_STEP = "test_a_repeated_step_gives_equal_bits"
MISMATCHES = ("mismatch", "mismatch_fp32")
CARD = "H100"  # whose ceilings the goals in TFLOP/s are


@dataclass(frozen=True)
class Goal:
    """What is wanted of a figure: at least, or at most, `bound`; found is None where its stage gave none."""

    name: str
    relation: str
    bound: float
    found: float | None

    @property
    def reached(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.bound if self.relation == ">=" else self.found <= self.bound


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    parts = read_parts(source)
    reached = goals(parts)
    found = {"goals": [{**asdict(goal), "reached": goal.reached} for goal in reached], **parts}
    (target / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (target / "report.txt").write_text("\n".join(render(parts, reached)) + "\n")


def read_parts(folder: Path) -> Parts:
    """What of the stages' files is there and whole."""
    parts: Parts = {}
    for name in ("env", "kernels", "slice", *MISMATCHES, "baseline"):
        parts[name] = _whole(folder / f"{name}.json", json.loads)
    parts["quickstart"] = _whole(folder / "quickstart.jsonl", quickstart_figures)
    parts["tests"] = _whole(folder / "tests.xml", suite_figures)
    stages = folder / "stages.txt"
    lines = stages.read_text().splitlines() if stages.is_file() else []
    parts["stages"] = [
        {"stage": name, "exit": int(code), "seconds": int(seconds)} for name, code, seconds in map(str.split, lines)
    ]
    return parts


def _whole(file: Path, read: Callable[[str], Any]) -> Any:
    """What the file has; None where it is not there, or its stage was stopped while it wrote."""
    try:
        return read(file.read_text())
    except (FileNotFoundError, ValueError, ElementTree.ParseError):
        return None


def quickstart_figures(text: str) -> dict[str, float]:
    """The last value of each metric of a run's metrics.jsonl that says how it went."""
    kept = ("reward/mean", "eval/accuracy", "mismatch/k3", "throughput/tokens_per_second", "rollout/tokens_per_second")
    found: dict[str, float] = {}
    for line in text.splitlines():
        row = json.loads(line)
        found |= {key: row[key] for key in ("step", *kept) if key in row}
    return found


def suite_figures(text: str) -> dict[str, Any]:
    """Counts of a JUnit file, the failed tests with the last line of what they said, and each test that passed."""
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    messages: dict[str, str] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = case.get("name", "")
        bad = next((found for found in (case.find("failure"), case.find("error")) if found is not None), None)
        outcomes["failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"].append(
            name
        )
        if bad is not None:
            messages[name] = ((bad.get("message") or "").splitlines() or [""])[0][:200]
    return {**{kind: len(names) for kind, names in outcomes.items()}, "names": outcomes, "messages": messages}


def goals(parts: Parts) -> list[Goal]:
    """The goals of an H100, in the order of the table. Figures of a machine without a GPU say nothing of them."""
    if not (parts["env"] or {}).get("card"):
        parts = {**parts, **dict.fromkeys(("kernels", "slice", "baseline", *MISMATCHES, "tests", "quickstart"))}
    rows, mine, theirs = parts["kernels"], parts["slice"], parts["baseline"]
    tests = parts["tests"]
    return [
        Goal("token_log_probs forward, share of copy bandwidth", ">=", 0.85, _share(rows, "forward")),
        Goal("token_log_probs backward, share of copy bandwidth", ">=", 0.85, _share(rows, "backward")),
        Goal("linear_token_log_probs f+b, time / eager's", "<=", 1.0, _against_eager(rows, "seconds")),
        Goal("linear_token_log_probs f+b, memory / eager's", "<=", 0.125, _against_eager(rows, "extra_bytes")),
        Goal(
            "training forward + backward, model TFLOP/s",
            ">=",
            200.0,
            _figure(lambda: mine["forward_backward_tflops"]),
        ),
        Goal(
            "generation, tokens/s / TRL's",
            ">=",
            5.0,
            _figure(lambda: mine["rollout_tokens_per_second"] / theirs["rollout_tokens_per_second"]),
        ),
        Goal(
            "whole step, tokens/s / TRL's",
            ">=",
            4.0,
            _figure(lambda: mine["tokens_per_second"] / theirs["tokens_per_second"]),
        ),
        *(goal for name in MISMATCHES for goal in _mismatch_goals(name.partition("_")[2] or "bf16", parts[name])),
        Goal("tests/gpu that failed", "<=", 0, _figure(lambda: tests["failed"] if tests["passed"] else None)),
        Goal("a repeated step gives equal bits, tests passed", ">=", 1, _repeated(tests)),
        Goal("quickstart, steps taken", ">=", 1, _figure(lambda: parts["quickstart"]["step"])),
    ]


def _mismatch_goals(dtype: str, found: Any) -> tuple[Goal, Goal]:
    changed = _figure(lambda: found["metrics"]["routing/engine/slot_change"])
    k3 = _figure(lambda: found["metrics"]["mismatch/k3"])
    return (
        Goal(f"routes of engine and trainer that differ, {dtype}", "<=", 0.0, changed),
        Goal(f"k3 of engine and trainer, {dtype}", "<=", 1e-6, k3),
    )


def _figure(take: Callable[[], float | None]) -> float | None:
    """The figure, None where a part that it needs is not there."""
    try:
        return take()
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _row(rows: list[dict[str, Any]] | None, op: str, name: str, implementation: str) -> dict[str, Any]:
    wanted = {"op": op, "pass": name, "implementation": implementation}
    return next((row for row in rows or [] if wanted.items() <= row.items()), {})


def _share(rows: list[dict[str, Any]] | None, name: str) -> float | None:
    return _row(rows, "token_log_probs", name, "gspo_moe").get("copy_share")


def _against_eager(rows: list[dict[str, Any]] | None, key: str) -> float | None:
    mine, eager = (_row(rows, "linear_token_log_probs", "forward_backward", name) for name in ("gspo_moe", "eager"))
    return _figure(lambda: mine[key] / eager[key])


def _repeated(tests: dict[str, Any] | None) -> float | None:
    if tests is None or any(name.startswith(REPEATED_STEP) for name in tests["names"]["failed"]):
        return None if tests is None else 0.0
    return sum(name.startswith(REPEATED_STEP) for name in tests["names"]["passed"]) or None


def render(parts: Parts, reached: list[Goal]) -> Iterator[str]:
    """The lines of the table."""
    env = parts["env"] or {}
    yield f"{env.get('card') or 'no GPU'}, driver {env.get('driver')}, torch {env.get('torch')}"
    yield f"commit {env.get('commit')}"
    yield f"{env.get('time')}: {env.get('command')}"
    yield "stages: " + ", ".join(_stage(stage) for stage in parts["stages"])
    yield from _kernel_lines(parts["kernels"] or [])
    for name in ("slice", *MISMATCHES):
        if parts[name] is not None:
            yield from _throughput_lines(name, parts[name])
    if parts["baseline"] is not None:
        yield from _baseline_lines(parts["baseline"])
    if parts["tests"] is not None:
        counts = parts["tests"]
        yield f"tests/gpu: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        yield from (f"  FAILED {name}: {message}" for name, message in counts["messages"].items())
    if parts["quickstart"] is not None:
        yield "quickstart: " + ", ".join(f"{key} {value:.6g}" for key, value in parts["quickstart"].items())
    yield ""
    yield f"{'goal on an ' + CARD:<52} {'wanted':>10} {'found':>12}  reached"
    for goal in reached:
        found = "-" if goal.found is None else f"{goal.found:.4g}"
        answer = {True: "yes", False: "NO", None: "not run"}[goal.reached]
        yield f"{goal.name:<52} {goal.relation + f' {goal.bound:g}':>10} {found:>12}  {answer}"


def _stage(stage: dict[str, Any]) -> str:
    return f"{stage['stage']} {stage['seconds']} s" + (f" (exit {stage['exit']})" if stage["exit"] else "")


def _kernel_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = "{:<23} {:<9} {:<17} {:<29}"
    if rows:
        named = columns.format("kernel", "dtype", "pass", "implementation")
        yield f"{named} {'ms':>9} {'MiB':>9} {'GB/s':>6} {'of copy':>8}"
    for row in rows:
        named = columns.format(row["op"], row["dtype"], row.get("pass", ""), row["implementation"])
        if "error" in row:
            yield f"{named} failed: {row['error'][:90]}"
            continue
        line = f"{named} {row['seconds'] * 1e3:9.3f}"
        rate = f" {row['gbytes_per_second']:6.0f}" if "gbytes_per_second" in row else ""
        share = f" {row['copy_share']:8.1%}" if "copy_share" in row else ""
        yield f"{line} {row['extra_bytes'] / 2**20:9.1f}{rate}{share}"


def _throughput_lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    seconds = {phase: spread["max"] for phase, spread in found["seconds"].items()}
    seconds["update"] = found["update_seconds"]["max"]
    yield f"{name}: {found['parameters'] / 1e9:.2f} G parameters; s: " + _by_phase(seconds, ".3f")
    speed = found["tflops_per_process"]
    without = found["forward_backward_tflops"]
    yield f"  TFLOP/s: {_by_phase(speed, '.1f')}, forward + backward {without:.1f}"
    rates = (found["tokens_per_second"], found["rollout_tokens_per_second"])
    memory = found["peak_memory_gib"].get("device", {}).get("max", 0.0)
    yield "  {:.0f} tokens/s trained on, {:.0f} generated; peak {:.1f} GiB".format(*rates, memory)
    if found["profile"] is not None:
        form = "  step of {response_tokens}-token answers: {launches} launches, {graph_launches} graphs, {waits} waits"
        yield form.format(**found["profile"])


def _baseline_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"TRL {found['trl']}, transformers {found['transformers']}; s: " + _by_phase(found["seconds"], ".3f")
    rates = (found["tokens_per_second"], found["rollout_tokens_per_second"], found["peak_device_gib"])
    yield "  {:.0f} tokens/s trained on, {:.0f} generated; peak {:.1f} GiB".format(*rates)


def _by_phase(figures: dict[str, float], form: str) -> str:
    return ", ".join(f"{phase} {value:{form}}" for phase, value in figures.items())


if __name__ == "__main__":
    main()
