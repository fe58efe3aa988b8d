"""What comparing weights over ranks costs: `torchrun --nproc-per-node N tools/measure_replica_check.py CONFIG.yaml`.

Takes `STEPS` RL steps of the config (overrides may follow it) after a first one, then compares `CHECKS` times; prints
the CPU seconds of the first rank's process for one of each, and the share of a step with `parallel.check_interval`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

STEPS, CHECKS = 4, 50


def main(arguments: list[str]) -> None:
    from gspo_moe.config.loading import load_config
    from gspo_moe.parallel.groups import shut_down
    from gspo_moe.training.preflight import preflight
    from gspo_moe.training.resuming import open_trainer
    from gspo_moe.training.rl import rl_step
    from gspo_moe.training.session import open_session

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments[0], [*arguments[1:], f"logging.run_dir={Path(folder) / 'run'}"])
        trainer = open_trainer(open_session(preflight(config)))
        rl_step(trainer)
        trainer.replicas(0)
        start = time.process_time()
        for _ in range(STEPS):
            rl_step(trainer)
        step = (time.process_time() - start) / STEPS
        start = time.process_time()
        for number in range(CHECKS):
            trainer.replicas(number)
        check = (time.process_time() - start) / CHECKS
        if trainer.session.groups.is_main:
            interval = config.parallel.check_interval
            share = check / (interval * step)
            print(f"step {step:.3f} s, check {1000 * check:.2f} ms, every {interval} steps {share:.4%}")
        trainer.session.close()
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1:])
