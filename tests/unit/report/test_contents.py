"""The numbers in the figures, against the numbers in the runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gspo_moe.observability import load_run
from gspo_moe.observability.comparison import bootstrap_interval
from gspo_moe.observability.layers import LayerWriter
from gspo_moe.report.collect import collect
from gspo_moe.report.contents import contents
from gspo_moe.report.curves import moving_mean
from gspo_moe.report.figures import DotPanel, Figure, HeatPanel, LinePanel
from tests.runs import Metrics, write_run


def _accuracy(start: float) -> Metrics:
    return lambda step: {"eval/accuracy": start + 0.01 * step}


def _clipped(share: float) -> Metrics:
    return lambda step: {"clip_fraction/token": share, "clip_fraction/sequence": 0.0}


def _clipped_by_step(*shares: float) -> Metrics:
    return lambda step: {"clip_fraction/token": shares[step - 1]}


def _engine_change(change: float) -> Metrics:
    metric = "routing/engine/slot_change"
    return lambda step: {
        metric: change,
        f"{metric}/layer_00": change,
        "routing/staleness/flip_rate_by_margin/bin_0": 0.5,
    }


def _continuous(step: int) -> dict[str, float]:
    return {"reward/mean": 0.3, "eval/accuracy": 0.0, "eval/reward": 0.25 * step}


def _signal(step: int) -> dict[str, float]:
    return {
        "reward/mean": 0.3, "reward/parts/right": 0.25, "reward/parts/right_form": 0.05 * step, "reward/failures": 0.0,
        "reward/timeouts": 1.0 * step, "groups/degenerate": 2.0, "policy/entropy": 1.5, "response/truncated": 0.0,
        "eval/pass_at_8": 0.5,
    }  # fmt: skip


def _figures(*paths: Path) -> dict[str, Figure]:
    return {figure.key: figure for figure in contents(collect(paths)).figures}


def _line(figure: Figure, number: int = 0) -> LinePanel:
    panel = figure.panels[number]
    assert isinstance(panel, LinePanel)
    return panel


def test_a_study_has_every_figure(study: Path) -> None:
    assert list(_figures(study)) == [
        "reward", "outcomes", "reward_parts", "signal", "clip_fraction", "ratio_spread", "volatility",
        "volatility_layers_staleness",
        "attribution", "load", "speed", "health",
    ]  # fmt: skip


def test_a_curve_is_the_mean_over_seeds_of_moving_means_with_its_interval(study: Path) -> None:
    curve = _line(_figures(study)["reward"]).curves[1]
    runs = [load_run(study / "gspo" / f"seed{seed}").values("reward/mean") for seed in (1, 2, 3)]
    smooth = np.stack([moving_mean(values) for values in runs])
    assert curve.arm == "gspo"
    np.testing.assert_array_equal(curve.x, np.arange(1, 61))
    np.testing.assert_allclose(curve.mean, smooth.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose([curve.low, curve.high], bootstrap_interval(smooth), rtol=1e-12)
    assert curve.raw is not None
    np.testing.assert_allclose(curve.raw, np.stack(runs).mean(axis=0), rtol=1e-12)
    assert set(curve.seeds) == {3}


def test_a_seed_that_stopped_early_leaves_the_mean_and_its_number_of_seeds(tmp_path: Path) -> None:
    for seed, steps in ((1, 6), (2, 3)):
        write_run(
            tmp_path / "arm" / f"seed{seed}",
            _accuracy(0.1 * seed),
            steps=range(1, steps + 1),
            overrides=("schedule.steps=6",),
        )
    figures = _figures(tmp_path / "arm")
    curve = _line(figures["reward"]).curves[0]
    np.testing.assert_array_equal(curve.seeds, [2, 2, 2, 1, 1, 1])
    np.testing.assert_allclose(curve.mean, [0.16, 0.17, 0.18, 0.14, 0.15, 0.16], rtol=1e-12)
    assert np.isnan(curve.low[3:]).all()
    assert figures["reward"].notes == tuple(
        f"{name}: no run has a value to draw" for name in ("reward/mean", "eval/reward")
    )
    assert "arm/seed2" in figures["outcomes"].notes[0]
    ends = figures["outcomes"].panels[0]
    assert isinstance(ends, DotPanel)
    assert ends.dots[0].values == (0.16,)


def test_paired_differences_are_taken_seed_by_seed_to_the_baseline(study: Path) -> None:
    panel = _figures(study)["outcomes"].panels[1]
    assert isinstance(panel, DotPanel)
    ends = {
        (arm, seed): load_run(study / arm / f"seed{seed}").values("eval/accuracy")[-1]
        for arm in ("gspo", "grpo")
        for seed in (1, 2, 3)
    }
    expected = [ends["gspo", seed] - ends["grpo", seed] for seed in (1, 2, 3)]
    assert [row.arm for row in panel.dots] == ["gspo"]
    np.testing.assert_allclose(panel.dots[0].values, expected, rtol=1e-12)
    assert panel.dots[0].mean == pytest.approx(np.mean(expected))
    assert (panel.reference, "grpo" in panel.title) == (0.0, True)


def test_the_heat_map_is_by_layer_and_step_with_the_floor(study: Path) -> None:
    panel = _figures(study)["volatility_layers_staleness"].panels[1]
    assert isinstance(panel, HeatPanel)
    runs = [load_run(study / "gspo" / f"seed{seed}") for seed in (1, 2, 3)]
    for layer in range(4):
        values = [run.values(f"routing/staleness/slot_change/layer_{layer:02d}") for run in runs]
        np.testing.assert_allclose(panel.values_LS[layer], np.mean(values, axis=0), rtol=1e-12)
    floor = np.mean([run.values("routing/staleness/noise_floor/slot_change").mean() for run in runs])
    assert panel.floor_L is not None
    np.testing.assert_allclose(panel.floor_L, floor, rtol=1e-12)


def test_figures_by_layer_come_from_the_runs_arrays_where_it_has_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda step: {"reward/mean": 0.1}, steps=range(1, 4))
    rng = np.random.default_rng(5)
    change, floor, tokens = rng.random((3, 2)), rng.random((3, 2)), rng.random((3, 2, 8))
    arrays = {
        "routing/update/slot_change": change,
        "routing/update/noise_floor/slot_change": floor,
        "routing/load/tokens": tokens,
    }
    writer = LayerWriter(run)
    for step in range(3):
        writer.append(step + 1, {name: values[step] for name, values in arrays.items()})
    writer.flush()
    figures = _figures(run)
    change_map, load_map = (figures[key].panels[0] for key in ("volatility_layers_update", "load_experts"))
    assert isinstance(change_map, HeatPanel)
    assert isinstance(load_map, HeatPanel)
    np.testing.assert_allclose(change_map.values_LS, change.T, rtol=1e-6)
    assert change_map.floor_L is not None
    np.testing.assert_allclose(change_map.floor_L, floor.mean(axis=0), rtol=1e-6)
    total = tokens.sum(axis=0)
    np.testing.assert_allclose(load_map.values_LS, 8 * total / total.sum(axis=1, keepdims=True), rtol=1e-6)


def test_without_a_floor_the_first_mini_batch_stands_in_and_the_page_says_so(tmp_path: Path) -> None:
    change = "routing/staleness/slot_change"
    run = write_run(tmp_path / "old", lambda step: {change: 0.02, f"{change}/mini_batch_1": 0.001}, steps=range(1, 4))
    figure = _figures(run)["volatility"]
    np.testing.assert_allclose(_line(figure).floors[0].mean, 0.001)
    assert "mini-batch 1" in figure.notes[0]
    bare = write_run(tmp_path / "bare", lambda step: {change: 0.02}, steps=range(1, 4))
    assert _figures(bare)["volatility"].notes == ("staleness, bare: the noise floor was not measured",)


def test_long_runs_are_thinned_in_blocks_named_by_their_edges(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "long",
        lambda step: {"clip_fraction/sequence": 0.0, "clip_fraction/token": 0.1, "x/layer_00": 1.0,
                      "routing/staleness/slot_change/layer_00": step / 1000},
        steps=range(1, 1001),
    )  # fmt: skip
    figures = _figures(run)
    assert [panel.title for panel in figures["clip_fraction"].panels] == ["Tokens clipped"]
    assert figures["clip_fraction"].remarks == ("Sequences clipped: 0 at every step.",)
    assert len(_line(figures["clip_fraction"]).curves[0].x) == 400
    heat = figures["volatility_layers_staleness"].panels[0]
    assert isinstance(heat, HeatPanel)
    assert heat.values_LS.shape == (1, 112)
    np.testing.assert_allclose(heat.values_LS[0, :2], [0.005, 0.014], rtol=1e-12)
    assert (heat.columns[0], heat.columns[-1]) == ("1 to 9", "1000")
    np.testing.assert_array_equal(heat.x[[0, 1, -1]], [5, 14, 1000])


def test_zeros_are_marked_on_a_log_axis_and_count_in_the_mean(tmp_path: Path) -> None:
    for seed, first in ((1, 0.0), (2, 0.5)):
        write_run(tmp_path / "arm" / f"seed{seed}", _clipped_by_step(0.0, first, 0.25), steps=range(1, 4))
    (curve,) = _line(_figures(tmp_path / "arm")["clip_fraction"]).curves
    np.testing.assert_array_equal(curve.zeros, [1.0])
    np.testing.assert_array_equal(curve.mean, [0.0, 0.25, 0.25])


def test_a_continuous_reward_is_told_by_the_held_out_reward(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"seed{seed}", _continuous, steps=range(1, 4), overrides=("schedule.steps=3",))
    figures = _figures(tmp_path)
    assert [panel.title for panel in figures["reward"].panels] == ["Training reward", "Held-out reward"]
    assert figures["reward"].remarks[0].startswith("Held-out accuracy is 0 throughout")
    ends = [panel for panel in figures["outcomes"].panels if isinstance(panel, DotPanel)]
    assert [panel.title for panel in ends] == ["Held-out reward at the end", "Training reward at the end"]
    assert ends[0].dots[0].mean == 0.75


def test_parts_failures_groups_and_entropy_are_curves_and_zero_is_a_sentence(tmp_path: Path) -> None:
    figures = _figures(write_run(tmp_path / "run", _signal, steps=range(1, 3)))
    panels = [panel for panel in figures["reward_parts"].panels if isinstance(panel, LinePanel)]
    parts = {panel.title: panel.curves[0].mean for panel in panels}
    np.testing.assert_allclose(parts["right"], [0.25, 0.25])
    np.testing.assert_allclose(parts["right_form"], [0.05, 0.1])
    signal = figures["signal"]
    assert [panel.title for panel in signal.panels] == [
        "Groups without a difference", "Entropy of the policy", "Rewards out of time",
    ]  # fmt: skip
    assert signal.remarks == ("Rewards that failed: 0 at every step.", "Answers cut off: 0 at every step.")
    assert [panel.title for panel in figures["evaluation"].panels] == ["Pass at 8"]


def test_a_heat_map_of_zeros_is_one_sentence_and_bins_have_their_edges_names(tmp_path: Path) -> None:
    for name, change in (("flat", 0.0), ("moved", 0.5)):
        write_run(tmp_path / name, _engine_change(change), steps=range(1, 3))
    figure = _figures(tmp_path / "flat", tmp_path / "moved")["volatility_layers_engine"]
    assert [panel.arm for panel in figure.panels if isinstance(panel, HeatPanel)] == ["moved"]
    assert figure.remarks == ("flat: 0 in every layer at every step that was measured.",)
    alone = _figures(tmp_path / "flat")
    assert alone["volatility_layers_engine"].panels == ()
    assert alone["volatility"].remarks == ("Engine: 0 at every step.",)
    assert _line(alone["volatility"]).ticks[:2] == ("< 1e-4", "1e-4 to 1e-3")


def test_runs_with_different_metrics_say_which_arm_lacks_which(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", lambda step: {"reward/mean": 0.1, "ratio/token_std": 0.1}, steps=range(3))
    two = write_run(tmp_path / "two", lambda step: {"reward/mean": None, "sft/loss": 2.0}, steps=range(3))
    found = contents(collect([one, two]))
    notes = {figure.key: figure.notes for figure in found.figures}
    assert notes["ratio_spread"] == (
        "ratio/token_std not measured in: two",
        "ratio/sequence_std: no run has a value to draw",
    )
    assert any("routing/attribution/washout" in entry for entry in found.absent)
    assert [curve.arm for curve in _line({f.key: f for f in found.figures}["reward"]).curves] == ["one"]


def test_bank_arms_are_drawn_over_their_number_of_mini_batches(tmp_path: Path) -> None:
    for number in (8, 1):
        for seed in (1, 2):
            write_run(
                tmp_path / f"gspo.bank_n{number}" / f"seed{seed}",
                _clipped(0.01 * number * seed),
                steps=range(1, 2),
            )
    figures = _figures(tmp_path)
    assert list(figures) == ["bank_objective"]
    curve = _line(figures["bank_objective"]).curves[0]
    assert curve.arm == "gspo"
    np.testing.assert_array_equal(curve.x, [1, 8])
    np.testing.assert_allclose(curve.mean, [0.015, 0.12], rtol=1e-12)
    np.testing.assert_array_equal(curve.seeds, [2, 2])


def test_bank_arms_are_compared_at_equal_seed_and_number_of_mini_batches(tmp_path: Path) -> None:
    for arm, gain in (("gspo", 0.0), ("grpo_r2", 0.125)):
        for number in (1, 8):
            for seed in (1, 2):
                metrics = _accuracy(0.25 * seed + gain * number)
                write_run(
                    tmp_path / f"{arm}.bank_n{number}" / f"seed{seed}",
                    metrics,
                    steps=range(1, 2),
                    overrides=("schedule.steps=1",),
                )
    (tmp_path / "summary.json").write_text('{"baseline": "gspo", "arms": {}}')
    panels = _figures(tmp_path)["bank_differences"].panels
    assert [panel.title.split(":")[0] for panel in panels] == ["Held-out accuracy, N = 1", "Held-out accuracy, N = 8"]
    for panel, number in zip(panels, (1, 8), strict=True):
        assert isinstance(panel, DotPanel)
        (row,) = panel.dots
        assert row.arm == "grpo_r2"
        np.testing.assert_allclose(row.values, [0.125 * number] * 2, rtol=1e-12)
