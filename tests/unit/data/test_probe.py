"""The probe set stays what the run's first probe made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.data.probe import probe_set
from gspo_moe.errors import DataError
from gspo_moe.types import TrainingSample


def samples(step: int) -> list[TrainingSample]:
    """Three prompts of four answers each."""
    return [TrainingSample((step, prompt, answer), (0, 0, 1)) for prompt in range(3) for answer in range(4)]


def test_one_answer_to_each_prompt_comes_before_a_second(tmp_path: Path) -> None:
    chosen = probe_set(tmp_path, samples(1), group_size=4, count=5, resumed=False, main=True)
    assert [sample.token_ids[1:] for sample in chosen] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]


def test_a_run_that_goes_on_keeps_its_set_and_one_that_starts_anew_does_not(tmp_path: Path) -> None:
    first = probe_set(tmp_path, samples(1), group_size=4, count=5, resumed=False, main=True)
    assert probe_set(tmp_path, samples(7), group_size=4, count=5, resumed=True, main=True) == first
    anew = probe_set(tmp_path, samples(7), group_size=4, count=5, resumed=False, main=True)
    assert anew[0].token_ids[0] == 7


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    probe_set(tmp_path, samples(1), group_size=4, count=5, resumed=False, main=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "probe.jsonl").write_text('{"token_ids": [1, 2]}')
    with pytest.raises(DataError, match=r"probe\.jsonl is damaged"):
        probe_set(tmp_path, samples(1), group_size=4, count=5, resumed=True, main=True)
