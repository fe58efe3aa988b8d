"""What a study says of rewards that failed in its jobs."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gspo_moe.observability.reward_errors import RewardErrors
from gspo_moe.study.cells import Job
from gspo_moe.study.runner import Outcome
from gspo_moe.study.study import _with_reward_errors
from gspo_moe.types import Reward
from tests.rollouts import rewarded


def tell(folder: Path, error: str) -> None:
    group = rewarded("train/0", (0.0, 1.0), (1, 1), (True, True))
    broken = replace(group.rollouts[0], reward=Reward(0.0, error=error))
    told = replace(group, rollouts=(broken, group.rollouts[1]))
    RewardErrors(folder, main=True, allow_all_failed=False).check([told], "step 1")


def test_the_first_reward_error_of_any_job_is_told_once(tmp_path: Path) -> None:
    jobs = [Job(name, (), tmp_path / name, tmp_path / name / "product") for name in ("one", "two")]
    shown: list[Any] = []
    said = io.StringIO()
    show = _with_reward_errors(lambda running, outcome: shown.append(outcome), Console(file=said, width=200))
    outcome = Outcome(finished=jobs)
    show([], outcome)
    assert said.getvalue() == ""
    tell(tmp_path / "two", "train/3: ValueError: [red]")
    for _ in range(2):
        show([], outcome)
    tell(tmp_path / "one", "train/4: late")
    show([], outcome)
    assert shown == [outcome] * 4
    place = tmp_path / "two" / "reward_errors.txt"
    assert said.getvalue() == f"{place}, step 1: 1 of 2 rewards failed; the first: train/3: ValueError: [red]\n"
