"""Whether generation and training overlap: `python tools/compare_overlap.py RUN_ON_POLICY RUN_AHEAD`.

Both runs took the same steps, the first with `rollout.max_staleness: 0`. Printed of each: median seconds of a step, how
long of it the trainer waited for answers, trained, and gave servers its weights, the servers' idle seconds, and the
mean lag; behind them the second run's step over the first one's. `--skip` leaves out the first steps, which warm up.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import median

SHOWN = {
    "step s": ("timing/step_seconds",),
    "waits s": ("timing/rollout_seconds", "timing/waiting_seconds"),
    "training s": ("timing/training_seconds",),
    "old log-probs s": ("timing/old_log_probs_seconds",),
    "weights s": ("sync/seconds",),
    "servers idle s": ("queue/idle_seconds",),
    "lag": ("lag/mean",),
    "reward": ("reward/mean",),
}


def medians(series: Mapping[str, Sequence[float]], skip: int) -> dict[str, float]:
    """Of what a run has of `SHOWN`, without its first `skip` steps. series: values by step of each metric."""
    found = {}
    for name, keys in SHOWN.items():
        key = next((each for each in keys if each in series), None)
        if key is not None:
            found[name] = median(series[key][skip:])
    return found


def main() -> None:
    from gspo_moe.observability import load_run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, metavar="RUN")
    parser.add_argument("--skip", type=int, default=2)
    options = parser.parse_args()
    found = []
    for path in options.runs:
        run = load_run(path)
        found.append(medians({name: run.values(name).tolist() for name in run.names}, options.skip))
    rows = [name for name in SHOWN if any(name in each for each in found)]
    for name in rows:
        print(f"{name:<16}" + "".join(f"{each[name]:10.3f}" if name in each else f"{'':>10}" for each in found))
    print(f"step of the second over the first: {found[1]['step s'] / found[0]['step s']:.2f}")


if __name__ == "__main__":
    main()
