"""What recording routes costs: its share of a whole RL step's time, and bytes a token; or what auditing a replay does.

    python tools/benchmark_recorder.py CONFIG.yaml [section.key=value ...] [--pairs 40]
    python tools/benchmark_recorder.py CONFIG.yaml routing.replay=r2 --audit    # on a CPU

The same step (prompts, samples, weights) runs with the recorder and without, in turn; every pair of them gives one
ratio, which tells the whole cost where the machine is quiet. On a CPU, where nothing is queued, the time inside the
recorder's own calls (recording, gathering, comparing, load) is added up as well, which other work disturbs less. Of the
audit, which no key takes out of a step, only that is measured: its figures and checks and the routers' gradient norm.
Seconds are the process's CPU time on a CPU and wall time on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gspo_moe.cli import LIBRARY_NOISE, USER_ERROR
from gspo_moe.config import Config, load_config
from gspo_moe.errors import GspoMoeError

# Small enough that every step answers and trains on the same tokens.
STILL = "optimizer.lr=1e-12"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the route recorder's share of step time and its memory.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--pairs", type=int, default=40, help="steps with and without, each")
    parser.add_argument("--audit", action="store_true", help="of the replay, in place of the recorder")
    options = parser.parse_args()
    for module, category in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", module=module, category=category)
    try:
        with tempfile.TemporaryDirectory() as run_dir:
            config = load_config(options.config, [*options.overrides, STILL, f"logging.run_dir={run_dir}"])
            measure(config, options.pairs, options.audit)
    except GspoMoeError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return 0


def calls(audit: bool) -> list[tuple[Any, str]]:
    """The functions in which the recorder, or a replay's audit, spends its time: where each stands, and its name."""
    from gspo_moe.routing.recorder import RoutePass
    from gspo_moe.training import learn
    from gspo_moe.training.optimizer import Optimizer

    if audit:
        return [(learn, "replay_figures"), (Optimizer, "_router_grad_norm")]
    return [(RoutePass, "_choice"), (RoutePass, "recordings"), (learn, "routing_figures")]


def measure(config: Config, pairs: int, audit: bool) -> None:
    from gspo_moe.platform import device
    from gspo_moe.training import rl
    from gspo_moe.training.preflight import preflight
    from gspo_moe.training.resuming import open_trainer
    from gspo_moe.training.session import open_session

    clock = time.perf_counter if device().kind == "cuda" else time.process_time
    session = open_session(preflight(config))
    trainer = open_trainer(session)
    assert trainer.recorder is not None, "the config records nothing"
    assert not audit or config.routing.replay != "none", "the config replays nothing"
    inside, ways = [0.0], (True,) if audit else (True, False)
    for owner, name in calls(audit):
        setattr(owner, name, timed(getattr(owner, name), inside))
    start, recorder = trainer.progress, trainer.recorder

    def seconds(record: bool) -> float:
        trainer.progress = start
        trainer.recorder = recorder if record else None
        device().synchronize()
        began = clock()
        rl.rl_step(trainer)
        device().synchronize()
        return clock() - began

    for record in ways:
        seconds(record)
    inside[0] = 0.0
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(pairs):
        for record in ways if number % 2 else reversed(ways):
            found[record].append(seconds(record))
    session.close()
    if session.groups.is_main:
        if not audit:
            show(found, memory(session.plan.architecture))
        if device().kind == "cpu":
            print(f"inside the {'audit' if audit else 'recorder'}: {inside[0] / sum(found[True]):.2%} of {pairs} steps")


def timed(function: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """The function, adding this thread's CPU seconds in it to `total`."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*arguments)
        finally:
            total[0] += time.thread_time() - began

    return wrapped


def memory(architecture: Any) -> dict[str, int]:
    """Bytes a token that are kept for a mini-batch, all layers."""
    from gspo_moe.routing.recorder import route_dtype

    layers, topk = architecture.num_hidden_layers, architecture.num_experts_per_tok
    return {
        "routes": layers * topk * route_dtype(architecture.num_experts).itemsize,
        "margins and log-probs": layers * (1 + topk) * 4,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics between which the median lies with 95% confidence (binomial, its normal approximation)."""
    ordered = sorted(values)
    rank = max(round((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2), 1)
    return ordered[rank - 1], ordered[-rank]


def show(found: dict[bool, list[float]], bytes_per_token: dict[str, int]) -> None:
    ratios = [with_it / without - 1 for with_it, without in zip(found[True], found[False], strict=True)]
    low, high = median_interval(ratios)
    print(
        f"step without recorder: {statistics.median(found[False]):.3f} s, with: {statistics.median(found[True]):.3f} s"
    )
    middle = statistics.median(ratios)
    print(f"recorder's share: {middle:.2%} (median of {len(ratios)} pairs; 95% interval {low:.2%} to {high:.2%})")
    for what, count in bytes_per_token.items():
        print(f"{what}: {count} bytes a token")


if __name__ == "__main__":
    sys.exit(main())
