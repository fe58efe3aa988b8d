"""What a study says of rewards that failed in its jobs."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from gspo_moe.observability.reward_errors import RewardErrors
from gspo_moe.study.cells import Job
from gspo_moe.study.runner import Outcome
from gspo_moe.study.study import _with_reward_errors


def test_the_first_reward_error_of_any_job_is_told_once(tmp_path: Path) -> None:
    jobs = [Job(name, (), tmp_path / name, tmp_path / name / "product") for name in ("one", "two")]
    shown: list[Any] = []
    said = io.StringIO()
    show = _with_reward_errors(lambda running, outcome: shown.append(outcome), Console(file=said, width=200))
    outcome = Outcome(finished=jobs)
    show([], outcome)
    assert said.getvalue() == ""
    RewardErrors(tmp_path / "two").tell("step 1", 2, 8, "train/3: ValueError: [red]")
    for _ in range(2):
        show([], outcome)
    RewardErrors(tmp_path / "one").tell("step 1", 1, 8, "train/4: late")
    show([], outcome)
    assert shown == [outcome] * 4
    place = tmp_path / "two" / "reward_errors.txt"
    assert said.getvalue() == f"{place}, step 1: 2 of 8 rewards failed; the first: train/3: ValueError: [red]\n"
