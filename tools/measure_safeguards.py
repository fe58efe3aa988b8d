"""What watching over a run costs of a step: `torchrun --nproc-per-node N tools/measure_safeguards.py CONFIG.yaml`.

After `STEPS` RL steps of the config (overrides may follow it) each safeguard is called `CALLS` times, and a checkpoint
saved `SAVES` times. Figures are CPU seconds of the first rank's process in one call, and its share of a step: a part of
it where it comes every so many steps (`parallel.check_interval`, `checkpoint.interval`). Of a thread they are its CPU
seconds in a second by the clock, which is its share of a step that has the core to itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder

from tools.benchmark_checksums import cpu, summing

if TYPE_CHECKING:
    from gspo_moe.training.session import Trainer
    from gspo_moe.training.watch import Watch

STEPS, CALLS, SAVES = 30, 50, 5
THREADS = {"heartbeat": "(_go_on)", "lease": "(_beat)"}  # Python names a thread by the function that it runs


def main(arguments: list[str]) -> None:
    from gspo_moe.config.loading import load_config
    from gspo_moe.parallel.groups import shut_down
    from gspo_moe.parallel.signals import StopSignals
    from gspo_moe.training.preflight import preflight, take_run_folder
    from gspo_moe.training.resuming import open_trainer
    from gspo_moe.training.session import open_session
    from gspo_moe.training.watch import Watch

    run = Path(tempfile.gettempdir()) / f"gspo_moe_safeguards_{os.getppid()}"  # the same for all ranks of a launcher
    config = load_config(arguments[0], [*arguments[1:], f"logging.run_dir={run}"])
    take_run_folder(config, ends_together=True)
    with StopSignals() as stop:
        trainer = open_trainer(open_session(preflight(config), stop))
        with Watch(trainer) as watch:
            measure(trainer, watch)
        trainer.session.close()
        if trainer.session.groups.is_main:
            shutil.rmtree(run)
    shut_down()


def measure(trainer: Trainer, watch: Watch) -> None:
    from gspo_moe.training import saving
    from gspo_moe.training.rl import rl_step
    from gspo_moe.training.run_log import RunLog

    config, log = trainer.session.config, RunLog(trainer)
    rl_step(trainer)
    begun, before = time.monotonic(), thread_seconds()
    step = cpu(lambda: [rl_step(trainer) for _ in range(STEPS)]) / STEPS
    took = time.monotonic() - begun
    threads = {name: (seconds - before[name]) / took for name, seconds in thread_seconds().items()}
    safeguards: dict[str, tuple[Callable[[], object], int]] = {
        "signals": (trainer.session.stop.check, 1),
        "slow ranks": (watch.step_is_done, 1),
        "the run's folder": (lambda: saving.after_step(trainer, log), 1),
        "replicas": (lambda: trainer.replicas(0), config.parallel.check_interval),
        "before a save": (lambda: saving._check(trainer), config.checkpoint.interval),
    }
    found = {}
    for name, (call, interval) in safeguards.items():
        call()
        found[name] = cpu(partial(repeated, call)) / CALLS, interval
    saving.save(trainer, log)
    with summing() as spent:
        for _ in range(SAVES):
            saving.save(trainer, log)
    found["a save's checksums"] = sum(spent) / SAVES, config.checkpoint.interval
    if trainer.session.groups.is_main:
        show(step, threads, found)
    log.close()


def repeated(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def thread_seconds() -> dict[str, float]:
    """CPU seconds so far of the threads that watch."""
    found = {}
    for thread in threading.enumerate():
        for name, function in THREADS.items():
            if thread.name.endswith(function) and thread.ident is not None:
                found[name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


def show(step: float, threads: dict[str, float], found: dict[str, tuple[float, int]]) -> None:
    print(f"{'a step':20} {1000 * step:10.3f} ms")
    shares = list(threads.values())
    for name, share in threads.items():
        print(f"{name:20} {1000 * share:10.3f} ms a second     {share:9.4%}")
    for name, (seconds, interval) in found.items():
        shares.append(seconds / (interval * step) if interval else 0.0)
        print(f"{name:20} {1000 * seconds:10.3f} ms every {interval:5} {shares[-1]:9.4%}")
    print(f"{'all':44} {sum(shares):9.4%}")


if __name__ == "__main__":
    main(sys.argv[1:])
