import pytest

from gspo_moe.observability.no_learning import NoLearning


def told(steps: list[tuple[int, int]], caplog: pytest.LogCaptureFixture, main: bool = True) -> list[str]:
    caplog.clear()
    watch = NoLearning(main)
    for groups, equal in steps:
        watch.step(groups, equal, 0.25)
    return [record.getMessage() for record in caplog.records]


def test_five_steps_and_fifty_without_a_difference_are_said_once_each(caplog: pytest.LogCaptureFixture) -> None:
    first, second = told([(8, 8)] * 200, caplog)
    assert first.startswith("for 5 steps in a row all answers to every prompt have had the same reward (mean 0.25)")
    assert "stage=sft" in first
    assert second.startswith("for 50 steps in a row")
    assert told([(8, 8)] * 4, caplog) == []
    assert told([(8, 8)] * 5, caplog, main=False) == []


def test_one_group_that_differs_begins_the_count_again(caplog: pytest.LogCaptureFixture) -> None:
    assert told([*[(8, 8)] * 4, (8, 7), *[(8, 8)] * 4, (0, 0), *[(8, 8)] * 4], caplog) == []
    assert len(told([*[(8, 8)] * 4, (8, 7), *[(8, 8)] * 5, (8, 7), *[(8, 8)] * 49], caplog)) == 1
