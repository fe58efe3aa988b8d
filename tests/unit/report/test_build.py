from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from gspo_moe.cli import main
from gspo_moe.observability import load_run


def test_page_figures_and_numbers_are_written(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, figures, numbers = tmp_path / "out" / "r.html", tmp_path / "figures", tmp_path / "numbers.csv"
    assert main(["report", str(study), "--output", str(page), "--figures", str(figures), "--csv", str(numbers)]) == 0
    assert page.stat().st_size > 1_000_000
    assert not list(page.parent.glob("*.partial"))
    pictures = sorted(figures.glob("*.png"))
    assert len(pictures) == 10
    assert all(imread(picture).std() > 0.03 for picture in pictures)
    assert [path.stem for path in sorted(figures.glob("*.svg"))] == [path.stem for path in pictures]
    assert "10 figures" in capsys.readouterr().out

    with numbers.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["seed"]) == ("gspo", "2")]
    run = load_run(study / "gspo" / "seed2")
    assert len(rows) == sum(len(steps) for steps, _ in run.series.values())
    read = [float(row["value"]) for row in rows if row["metric"] == "reward/mean"]
    np.testing.assert_array_equal(read, run.values("reward/mean"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "RUN"], "say what to write: --output"),
        (["report", "RUN", "--csv", "x.csv"], "neither a run"),
        (["report", "RUN", "--watch"], "neither a run"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([str(tmp_path) if part == "RUN" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
