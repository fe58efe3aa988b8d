"""A task of the user's own that is never made ends the process that makes it, which says so."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.tasks import in_time
from gspo_moe.tasks.in_time import make_task_in_time

HUNG = """
import re, sys, time

def sleeps(options, seed):
    try:
        time.sleep(3600)
    except BaseException:
        time.sleep(3600)

def hides(options, seed):
    sys.stderr = None
    print("hidden from here on")
    time.sleep(3600)

def matches(options, seed):
    re.match("(a|a)*$", 60 * "a" + "b")
"""
# `matches` holds the interpreter's lock.
MAKE = """
import sys
from gspo_moe.config.task import TaskConfig
from gspo_moe.tasks import in_time

in_time.GRACE_SECONDS = 0.5
in_time.make_task_in_time(TaskConfig.model_validate_json(sys.argv[1]), 1)
"""


@pytest.mark.parametrize(
    ("task", "code", "told"),
    [
        (
            '"name": "hung:sleeps", "reward": {',
            2,
            ("gspo-moe: ConfigError: task.name=hung:sleeps: the task is not made after task.reward.start_seconds=0.5, "
             "so that an import or a constructor hangs; mend it, or raise the limit. It is at\n", "in sleeps\n"),
        ),
        (
            '"reward": {"name": "hangs.py:reward", ',
            2,
            ("task.name=sort_letters and task.reward=hangs.py:reward: the task is not made", "line 1, in <module>\n"),
        ),
        ('"name": "hung:hides", "reward": {', 2, ("ConfigError: task.name=hung:hides: ", "in hides\n")),
        ('"name": "hung:matches", "reward": {', 1, ("in matches\n",)),
    ],
)  # fmt: skip
def test_what_hangs_ends_the_process(task: str, code: int, told: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "hung.py").write_text(HUNG)
    (tmp_path / "hangs.py").write_text("import time; time.sleep(3600)\n")
    config = f'{{{task}"start_seconds": 0.5}}}}'
    ended = subprocess.run(
        [sys.executable, "-c", MAKE, config], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code
    for part in told:
        assert part in ended.stderr


def test_a_task_that_is_made_in_time_stays_unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(in_time, "GRACE_SECONDS", 0.1)
    task = make_task_in_time(TaskConfig(reward=RewardConfig(start_seconds=0.3)), seed=1)
    assert task.name == "sort_letters"
    for thread in threading.enumerate():
        if thread.name == in_time.WATCH:
            thread.join(10.0)
    assert in_time.WATCH not in [thread.name for thread in threading.enumerate()]
    time.sleep(0.5)  # past both limits
