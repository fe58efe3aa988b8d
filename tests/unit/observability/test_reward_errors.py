from pathlib import Path

import pytest

from gspo_moe.observability.reward_errors import RewardErrors, first_reward_error


def test_the_first_error_is_shown_and_every_batchs_first_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert first_reward_error(tmp_path / "run") is None
    for _ in range(2):  # a run and its continuation
        errors = RewardErrors(tmp_path / "run")
        errors.tell("step 1", 2, 8, "train/3: ValueError: é")
        errors.tell("step 2", 1, 8, "train/9: no reward")
    lines = ["step 1: 2 of 8 rewards failed; the first: train/3: ValueError: é"]
    lines.append("step 2: 1 of 8 rewards failed; the first: train/9: no reward")
    assert (tmp_path / "run" / "reward_errors.txt").read_text(encoding="utf-8").split("\n\n") == [*lines * 2, ""]
    assert first_reward_error(tmp_path / "run") == lines[0]
    assert [record.message.splitlines()[0] for record in caplog.records] == lines[:1] * 2
    assert "reward_errors.txt" in caplog.records[0].message
