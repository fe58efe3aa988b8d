"""Runs one scenario on the pretended GPU and prints the waits of it as JSON, by function.

python -m tests.pretend_cuda.run SCENARIO [--lines]     --lines: each with the lines that led to it
python -m tests.pretend_cuda.run --write                measures all scenarios with bounds and writes bounds.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

BOUNDS = Path(__file__).with_name("bounds.json")
BOUNDED = ("decode_step", "training_step")


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        measured = {name: measure(name) for name in BOUNDED}
        BOUNDS.write_text(json.dumps(measured, indent=2) + "\n")
        return
    from tests.pretend_cuda.device import install

    install()
    import torch

    torch.set_num_threads(1)
    from tests.pretend_cuda.scenarios import SCENARIOS
    from tests.pretend_cuda.waits import by_function

    found = SCENARIOS[arguments[0]]()
    if "--lines" in arguments:
        shown = {f"{kind} {lines}": count for (kind, lines), count in Counter(found).most_common()}
    else:
        shown = by_function(found)
    print(json.dumps(shown, indent=2))


def measure(scenario: str, *options: str) -> dict[str, int]:
    """Waits of a scenario in a process of its own, as `main` prints them. Raises RuntimeError with what it said."""
    from tests.launch import free_port

    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.pretend_cuda.run", scenario, *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **where, "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{scenario} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
