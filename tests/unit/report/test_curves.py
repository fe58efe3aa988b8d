from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gspo_moe.config import load_config, save_config
from gspo_moe.errors import DataError
from gspo_moe.observability import load_run
from gspo_moe.observability.jsonl import JsonLines
from gspo_moe.report.curves import curves_figure, draw_curves, moving_mean

STEPS = range(1, 61)


def _value(name: str, step: int) -> float:
    return 0.5 + 0.3 * np.sin(step / 7 + len(name))


def _run(run_dir: Path, *names: str, steps: range = STEPS, stage: str = "rl") -> Path:
    save_config(load_config(None, [f"stage={stage}", "seed=9"]), run_dir / "config.yaml")
    lines = JsonLines(run_dir / "metrics.jsonl", 0)
    for step in steps:
        lines.append({"step": step, **{name: _value(name, step) for name in names}})
    lines.close()
    return run_dir


def _panels(figure: Figure) -> dict[str, list[str]]:
    return {
        axes.get_title(loc="left") or axes.get_title(): [
            str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")
        ]
        for axes in figure.axes
    }


def _lines(figure: Figure, panel: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in figure.axes[panel].lines]


def test_every_panel_draws_its_curves_and_the_picture_is_written(tmp_path: Path) -> None:
    staleness = "routing/staleness/slot_change"
    names = (
        "reward/mean", "eval/accuracy", "clip_fraction/sequence", "clip_fraction/token", "ratio/token_std",
        "ratio/sequence_std", "response/length_mean", "rollout/tokens_per_second", "throughput/tokens_per_second",
        staleness, f"{staleness}/mini_batch_1", f"{staleness}/mini_batch_2", f"{staleness}/mini_batch_10",
        f"{staleness}/layer_00",
    )  # fmt: skip
    path = draw_curves(_run(tmp_path, *names))
    assert path == tmp_path / "curves.png"
    picture = imread(path)
    assert picture.shape[1] > 1500
    assert picture.std() > 0.05
    assert _panels(curves_figure(load_run(tmp_path))) == {
        "Reward and held-out accuracy": ["training reward", "held-out accuracy"],
        "Clipped by the policy loss": ["sequences", "tokens"],
        "Expert slots changed": ["all", "mini-batch 1", "mini-batch 2", "mini-batch 10"],
        "Spread (std) of the policy ratio": ["token ratio", "sequence ratio"],
        "Response length": ["mean"],
        "Speed": ["generation", "whole step"],
    }


def test_thin_line_is_the_data_and_thick_line_itsmoving_mean(tmp_path: Path) -> None:
    figure = curves_figure(load_run(_run(tmp_path, "reward/mean", "eval/accuracy")))
    thin, thick, points = _lines(figure, 0)
    data = np.array([_value("reward/mean", step) for step in STEPS])
    np.testing.assert_array_equal(thin[0], list(STEPS))
    np.testing.assert_array_equal(thin[1], data)
    # 60 steps give windows of 5.
    expected = [data[max(0, i - 2) : i + 3].mean() for i in range(len(data))]
    np.testing.assert_allclose(thick[1], expected, rtol=1e-12)
    np.testing.assert_array_equal(points[1], [_value("eval/accuracy", step) for step in STEPS])


def test_the_moving_mean_leaves_nan_out() -> None:
    values = np.full(60, 2.0)
    values[[0, 30]] = np.nan
    np.testing.assert_allclose(moving_mean(values), 2.0, rtol=1e-12)


def test_axes_carry_the_catalogs_units_and_the_heading_names_the_run(tmp_path: Path) -> None:
    figure = curves_figure(load_run(_run(tmp_path, "reward/mean")))
    units = ["reward or fraction", "fraction", "fraction", "ratio", "tokens", "tokens/s"]
    assert [axes.get_ylabel() for axes in figure.axes] == units
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    heading = figure.get_suptitle()
    for part in (tmp_path.name, "gspo on sort_letters", "seed 9"):
        assert part in heading


def test_panels_without_data_say_which_metric_is_missing(tmp_path: Path) -> None:
    figure = curves_figure(load_run(_run(tmp_path, "reward/mean")))
    texts = [" ".join(text.get_text() for text in axes.texts) for axes in figure.axes]
    assert texts[0] == ""
    assert texts[2] == "not measured in this run:\nrouting/staleness/slot_change"
    assert "clip_fraction/token" in texts[1]


def test_a_supervised_run_draws_loss_and_accuracy(tmp_path: Path) -> None:
    figure = curves_figure(load_run(_run(tmp_path, "sft/loss", "sft/token_accuracy", stage="sft")))
    assert _panels(figure) == {"Supervised loss": ["training loss"], "Accuracy": ["response tokens, training"]}
    assert [axes.get_ylabel() for axes in figure.axes] == ["nats", "fraction"]


@pytest.mark.parametrize("value", ["0", "-0.5", "null"])
def test_one_step_zeros_negatives_and_nan_draw_without_a_warning(tmp_path: Path, value: str) -> None:
    names = ("reward/mean", "ratio/token_std", "clip_fraction/token")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, ' + ", ".join(f'"{name}": {value}' for name in names) + "}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(tmp_path)
    low, high = curves_figure(load_run(tmp_path)).axes[0].get_ylim()
    assert value == "null" or low <= float(value) <= high


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        draw_curves(tmp_path)
