from dataclasses import replace
from pathlib import Path

import pytest

from gspo_moe.errors import RewardError
from gspo_moe.observability.reward_errors import RewardErrors, first_reward_error
from gspo_moe.types import Reward, RolloutGroup
from tests.rollouts import rewarded


def groups(failed: int) -> list[RolloutGroup]:
    return [rewarded("train/0", (0.0, 1.0), (1, 1), (True, True), failed)]


def test_failed_rewards_are_shown_and_kept_also_where_they_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run" / "reward_errors.txt"
    lines = ["step 2: 1 of 2 rewards failed; the first: it broke", "step 3: 2 of 2 rewards failed; the first: it broke"]
    for attempt in range(2):  # a run and its continuation
        errors = RewardErrors(tmp_path / "run", main=True, allow_all_failed=False)
        errors.check(groups(0), "step 1")
        assert attempt or not file.exists()
        assert attempt or first_reward_error(tmp_path / "run") is None
        errors.check(groups(1), "step 2")
        with pytest.raises(RewardError, match="none of 2 answers got a reward; the first: it broke"):
            errors.check(groups(2), "step 3")
    assert file.read_text(encoding="utf-8").split("\n\n") == [*lines * 2, ""]
    assert first_reward_error(tmp_path / "run") == lines[0]
    assert [record.message.splitlines()[0] for record in caplog.records] == lines[:1] * 2
    assert "reward_errors.txt" in caplog.records[0].message


def test_where_all_may_fail_each_batch_says_so_and_too_many_in_a_row_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    errors = RewardErrors(tmp_path, main=True, allow_all_failed=True, max_failed_batches=3)
    for step, failed in enumerate((2, 2, 1, 2, 2), start=1):
        errors.check(groups(failed), f"step {step}")
    said = [record.message for record in caplog.records if "none of" in record.message]
    left = {1: 2, 2: 1, 4: 2, 5: 1}
    assert said == [
        f"step {step}: none of 2 answers got a reward; the run ends where {more} batches more in a row have none"
        for step, more in left.items()
    ]
    with pytest.raises(RewardError, match="as in 3 batches in a row"):
        errors.check(groups(2), "step 6")


def test_an_error_of_lone_surrogates_is_kept_too(tmp_path: Path) -> None:
    (one,) = groups(0)
    broken = tuple(replace(each, reward=Reward(0.0, error="\ud800 broke")) for each in one.rollouts)
    RewardErrors(tmp_path, main=True, allow_all_failed=True).check([replace(one, rollouts=broken)], "step 1")
    assert first_reward_error(tmp_path) == "step 1: 2 of 2 rewards failed; the first: \\ud800 broke"


def test_one_process_alone_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RewardErrors(tmp_path, main=False, allow_all_failed=False).check(groups(1), "step 1")
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_a_share_of_failures_beyond_the_limit_ends_the_run(tmp_path: Path) -> None:
    RewardErrors(tmp_path, main=True, allow_all_failed=False, max_failure_rate=0.5).check(groups(1), "step 1")
    strict = RewardErrors(tmp_path, main=True, allow_all_failed=True, max_failure_rate=0.4)
    strict.check(groups(0), "step 1")
    with pytest.raises(
        RewardError, match=r"1 of 2 rewards failed, a larger share than task\.reward\.max_failure_rate=0\.4"
    ):
        strict.check(groups(1), "step 2")
    never = RewardErrors(tmp_path, main=True, allow_all_failed=True, max_failure_rate=0.0)
    never.check(groups(0), "step 1")
    with pytest.raises(RewardError, match="it broke"):
        never.check(groups(1), "step 2")


def test_an_error_with_empty_lines_is_one_entry(tmp_path: Path) -> None:
    (one,) = groups(0)
    broken = tuple(replace(each, reward=Reward(0.0, error="one\n\n \ntwo")) for each in one.rollouts)
    RewardErrors(tmp_path, main=True, allow_all_failed=True).check([replace(one, rollouts=broken)], "step 1")
    assert first_reward_error(tmp_path) == "step 1: 2 of 2 rewards failed; the first: one\ntwo"
    with pytest.raises(RewardError, match=r"the first: two \(in whole: .*reward_errors\.txt\); mend the reward"):
        RewardErrors(tmp_path, main=True, allow_all_failed=False).check([replace(one, rollouts=broken)], "step 1")
