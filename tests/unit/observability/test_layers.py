from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gspo_moe.errors import DataError
from gspo_moe.observability import load_run
from gspo_moe.observability.layers import FILE, LayerWriter

NAME, RARE = "routing/staleness/slot_change", "routing/load/tokens"


def figures(step: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {NAME: np.array([0.5, 0.25, np.nan]) * step}
    return found | ({RARE: np.full((3, 8), step)} if step % 5 == 0 else {})


def write(folder: Path, steps: range, resume_step: int = 0) -> LayerWriter:
    writer = LayerWriter(folder, resume_step)
    for step in steps:
        writer.append(step, figures(step))
    return writer


def check(folder: Path, last: int) -> None:
    (folder / "metrics.jsonl").touch()
    layers = load_run(folder).layers
    assert set(layers) == {NAME, RARE}
    for name, every in ((NAME, range(1, last + 1)), (RARE, range(5, last + 1, 5))):
        steps, values = layers[name]
        np.testing.assert_array_equal(steps, every)
        np.testing.assert_array_equal(values, np.stack([figures(step)[name] for step in every]).astype(np.float32))


def test_figures_come_back_as_arrays_by_name(tmp_path: Path) -> None:
    write(tmp_path, range(1, 21)).flush()
    check(tmp_path, last=20)


def test_a_kill_leaves_a_whole_file_at_most_a_sixteenth_short(tmp_path: Path) -> None:
    for last in (1, 7, 40, 100):
        write(tmp_path, range(1, last + 1))  # never flushed
        (tmp_path / f"{FILE}.partial").write_bytes(b"torn")
        (tmp_path / "metrics.jsonl").touch()
        steps, _ = load_run(tmp_path).layers[NAME]
        assert last - last / 16 <= steps[-1] <= last
        assert steps.tolist() == list(range(1, len(steps) + 1))


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 15)).flush()
    write(tmp_path, range(11, 31), resume_step=10).flush()
    check(tmp_path, last=30)


def test_a_run_that_starts_anew_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11)).flush()
    write(tmp_path, range(1, 6)).flush()
    check(tmp_path, last=5)


def test_a_run_without_the_file_has_no_layers(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert load_run(tmp_path).layers == {}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(DataError, match=f"{FILE} is damaged"):
        LayerWriter(tmp_path, resume_step=3)
