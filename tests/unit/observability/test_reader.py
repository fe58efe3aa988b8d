from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gspo_moe.config import load_config, save_config
from gspo_moe.errors import DataError
from gspo_moe.observability import load_run


def _write(run_dir: Path, text: str) -> None:
    (run_dir / "metrics.jsonl").write_text(text)


def test_metrics_come_back_as_arrays_by_name(tmp_path: Path) -> None:
    _write(
        tmp_path,
        '{"step": 0, "time": 1.0, "eval/accuracy": 0.25}\n'
        '{"step": 1, "time": 2.0, "reward/mean": 0.1, "loss/policy": null}\n'
        '{"step": 2, "time": 3.0, "reward/mean": 0.30000000000000004}\n'
        '{"step": 2, "time": 4.0, "eval/accuracy": 0.5}\n',
    )
    run = load_run(tmp_path)
    assert run.names == ("eval/accuracy", "loss/policy", "reward/mean")
    assert run.problems == ()
    assert run.config == {}
    assert "array" not in repr(run)  # a notebook shows it
    assert repr(run) == f"Run(path={tmp_path!r}, problems=())"
    np.testing.assert_array_equal(run.steps("eval/accuracy"), [0, 2])
    np.testing.assert_array_equal(run.values("reward/mean"), np.array([0.1, 0.30000000000000004]))
    np.testing.assert_array_equal(run.values("loss/policy"), [np.nan])
    with pytest.raises(KeyError):
        run.values("reward/std")


def test_the_last_of_several_values_at_a_step_counts(tmp_path: Path) -> None:
    _write(tmp_path, '{"step": 2, "x": 1}\n{"step": 1, "x": 2}\n{"step": 2, "x": 3}\n')
    run = load_run(tmp_path)
    np.testing.assert_array_equal(run.steps("x"), [1, 2])
    np.testing.assert_array_equal(run.values("x"), [2.0, 3.0])


def test_a_torn_last_line_is_left_out_and_reported(tmp_path: Path) -> None:
    _write(tmp_path, '{"step": 1, "x": 1}\n{"step": 2, "x"')
    run = load_run(str(tmp_path))
    np.testing.assert_array_equal(run.steps("x"), [1])
    assert len(run.problems) == 1
    assert "line 2" in run.problems[0]


def test_the_resolved_config_comes_along(tmp_path: Path) -> None:
    _write(tmp_path, "")
    save_config(load_config(None, ["seed=5"]), tmp_path / "config.yaml")
    run = load_run(tmp_path)
    assert run.config["seed"] == 5
    assert run.config["optimizer"]["beta2"] == 0.95
    assert run.names == ()


@pytest.mark.parametrize("value", ['"text"', "[1, 2]", "{}"])
def test_a_value_that_is_no_number_is_named(tmp_path: Path, value: str) -> None:
    _write(tmp_path, f'{{"step": 1, "x": 1}}\n{{"step": 2, "x": {value}}}\n')
    with pytest.raises(DataError, match=r"step 2: x is .*, no number; mend that line"):
        load_run(tmp_path)


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist; give the folder of a run"):
        load_run(tmp_path / "nowhere")
