from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from gspo_moe.cli import main
from gspo_moe.observability import load_run
from gspo_moe.report.build import build_report
from tests.runs import Metrics, write_run


def _metrics(seed: int) -> Metrics:
    return lambda step: {
        "eval/accuracy": 0.1 * seed + 0.01 * step,
        "clip_fraction/token": 0.01 * step,
        "routing/staleness/slot_change/mini_batch_1": 0.0,
        **{f"routing/staleness/slot_change/layer_{layer:02d}": 0.001 * layer * step for layer in range(3)},
    }


def test_page_figures_and_numbers_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, page, figures, numbers = (tmp_path / name for name in ("study", "out/r.html", "figures", "numbers.csv"))
    for seed in (1, 2):
        write_run(study / "gspo" / f"seed{seed}", _metrics(seed), steps=range(1, 4), overrides=("schedule.steps=3",))
    assert main(["report", str(study), "--output", str(page), "--figures", str(figures), "--csv", str(numbers)]) == 0
    assert page.stat().st_size > 1_000_000
    assert not list(page.parent.glob("*.partial"))
    names = ["clip_fraction", "outcomes", "reward", "volatility", "volatility_layers_staleness"]
    assert sorted(path.name for path in figures.iterdir()) == [
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    ]
    assert all(imread(picture).std() > 0.03 for picture in figures.glob("*.png"))
    assert "5 figures" in capsys.readouterr().out

    with numbers.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["seed"]) == ("gspo", "2")]
    run = load_run(study / "gspo" / "seed2")
    assert len(rows) == sum(len(steps) for steps, _ in run.series.values())
    read = [float(row["value"]) for row in rows if row["metric"] == "eval/accuracy"]
    np.testing.assert_array_equal(read, run.values("eval/accuracy"))


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


def test_no_cell_of_the_numbers_is_a_formula(tmp_path: Path) -> None:
    names = ("=1+1", "+1", "-1", "@sum", "\t=1", "reward/mean")
    runs = [
        write_run(tmp_path / name, lambda step: dict.fromkeys(names, -0.5), steps=range(1, 2)) for name in names[:2]
    ]
    build_report(runs, csv=tmp_path / "numbers.csv")
    with (tmp_path / "numbers.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert {row[0] for row in rows} == {"'=1+1", "'+1"}
    assert {row[2] for row in rows} == {"'=1+1", "'+1", "'-1", "'@sum", "'\t=1", "reward/mean"}
    assert {row[4] for row in rows} == {"-0.5"}
