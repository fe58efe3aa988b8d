"""What a session does with rewards that failed, for training, evaluation and banks alike."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.config import load_config
from gspo_moe.errors import RewardError
from gspo_moe.training.session import Session
from gspo_moe.types import RolloutGroup
from tests.rollouts import rewarded


def groups(failed: int) -> list[RolloutGroup]:
    return [rewarded("train/0", (0.0, 1.0), (1, 1), (True, True), failed)]


def session(folder: Path, *, main: bool = True, allow: bool = False) -> Session:
    config = load_config(None, [f"logging.run_dir={folder}", f"task.reward.allow_all_failed={allow}"])
    part: Any = None
    plan: Any = SimpleNamespace(config=config)
    ranks: Any = SimpleNamespace(is_main=main)
    return Session(plan, ranks, part, part, part, frozenset(), part, part)


def test_failed_rewards_are_shown_and_kept_also_where_they_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, file = session(tmp_path), tmp_path / "reward_errors.txt"
    fine, some, none = map(groups, range(3))
    assert one.checked(fine, "step 1") is fine
    assert not file.exists()
    assert one.checked(some, "step 2") is some
    with pytest.raises(RewardError, match="none of 2 answers got a reward; the first: it broke"):
        one.checked(none, "step 3")
    assert file.read_text().split("\n\n")[:-1] == [
        "step 2: 1 of 2 rewards failed; the first: it broke",
        "step 3: 2 of 2 rewards failed; the first: it broke",
    ]
    assert len(caplog.records) == 1
    assert session(tmp_path, allow=True).checked(none, "step 4") is none


def test_one_process_alone_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session(tmp_path, main=False).checked(groups(1), "step 1")
    assert not caplog.records
    assert not list(tmp_path.iterdir())
