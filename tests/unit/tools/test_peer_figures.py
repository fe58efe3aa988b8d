"""tools/peer_figures.py and tools/sides.py: figures by hand, and a side that is a few lines of Python."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from gspo_moe.errors import TrainingError
from tools.peer_figures import figures_of, ratios
from tools.sides import Outcome, Side, run_side


def one(value: float) -> dict[str, float]:
    return {"min": value, "median": value, "max": value}


def ours(step: float, memory: float) -> Outcome:
    """half of the step is the rollout, a quarter is training, of which a tenth of a second is the update."""
    seconds = {"step": step, "rollout": step / 2, "old_log_probs": 0.5, "training": step / 4}
    figures = {
        "seconds": {phase: one(value) for phase, value in seconds.items()},
        "cpu_seconds": {**{phase: 2 * value for phase, value in seconds.items()}, "update": 0.2},
        "update_seconds": one(0.1),
    }
    return Outcome(figures, memory, memory)


def trl(step: float, memory: float) -> Outcome:
    phases = ("rollout", "old_log_probs", "forward_backward", "update")
    seconds = {"step": step, **dict.fromkeys(phases, step / 8)}
    return Outcome({"seconds": seconds, "cpu_seconds": seconds}, memory, memory)


def transformers(eager: float, grouped: float, training: float) -> Outcome:
    def both(value: float) -> dict[str, float]:
        return {"wall": value, "cpu": value}

    generate = {"eager": both(eager), "grouped_mm": both(grouped)}
    return Outcome({"generate": generate, "forward_backward": both(training)}, 1.0, 1.0)


ROUNDS: dict[str, list[Outcome]] = {
    "ours_1": [ours(4.0, 1.0), ours(5.0, 1.0), ours(8.0, 1.0)],
    "trl_1": [trl(12.0, 2.0), trl(15.0, 2.0), trl(16.0, 2.0)],
    "transformers_1": [transformers(9.0, 7.5, 2.0)] * 3,
    "ours_2": [ours(2.0, 1.5)] * 3,
    "trl_2": [trl(17.0, 2.5)] * 3,
    "transformers_2": [transformers(6.0, 7.0, 1.0)] * 3,
}


def test_figures_are_medians_and_spreads_of_the_rounds() -> None:
    found = figures_of("ours_1", ROUNDS["ours_1"])
    assert found["wall_seconds"]["step"] == {"min": 4.0, "median": 5.0, "max": 8.0}
    assert found["wall_seconds"]["forward_backward"]["median"] == pytest.approx(5.0 / 4 - 0.1)
    assert found["wall_seconds"]["rest"]["median"] == pytest.approx(5.0 - 2.5 - 0.5 - 1.25)
    assert found["cpu_seconds"]["rollout"]["max"] == 8.0


def test_ratios_take_the_best_setting_of_a_peer() -> None:
    found = {ratio.name: ratio for ratio in ratios(ROUNDS, 2, memory_target=0.5)}
    step = found["whole step, tokens/s, one thread each"]
    assert (step.wall, step.least, step.most) == (3.0, 2.0, 3.0)
    assert (step.cpu, step.target, step.reached) == (1.5, 2.5, True)
    # On two threads this TRL is slower than on one.
    both = found["whole step, tokens/s, 2 processes, 2 cores"]
    assert (both.peer, both.wall, both.target, both.reached) == ("trl_1", 7.5, 4.0, True)
    generation = found["generation, tokens/s, one thread each"]
    assert (generation.peer, generation.wall) == ("transformers_1 generate_grouped_mm", 3.0)
    generation = found["generation, tokens/s, 2 processes, 2 cores"]
    assert (generation.peer, generation.wall) == ("transformers_2 generate_eager", 6.0)
    training = found["forward + backward, time, one thread each"]
    assert training.wall == pytest.approx(1.15 / 2.0)
    assert training.reached
    memory = found["peak memory together, 2 processes, 2 cores"]
    assert (memory.wall, memory.reached) == (0.75, False)


WRITES = """
import json, sys, subprocess
held = b"x" * (64 << 20)
child = subprocess.Popen([sys.executable, "-c", "import time; held = b'y' * (64 << 20); time.sleep(3)"])
child.wait()
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({"seconds": 0.5}))
"""


def test_a_side_gives_its_figures_and_the_memory_of_all_its_processes() -> None:
    outcome = run_side(Side("both", (sys.executable, "-c", WRITES), {}))
    assert outcome.figures == {"seconds": 0.5}
    assert outcome.together_gib > 128 / 1024
    assert 64 / 1024 < outcome.largest_gib < outcome.together_gib


def test_a_side_that_fails_is_an_error_with_its_output() -> None:
    command: tuple[Any, ...] = (sys.executable, "-c", "print('its last words'); raise SystemExit(3)")
    with pytest.raises(TrainingError, match=r"(?s)ours_1 ended with exit code 3.*its last words"):
        run_side(Side("ours_1", command, {}))
