"""`gspo-moe parity`: what it compares, what it leaves out and what it says, with scores at hand and with real ones."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.cli import main
from gspo_moe.errors import ConfigError
from gspo_moe.scoring import parity
from gspo_moe.scoring.parity import Case, Tolerances, cases, difference, parse_layout
from tests.qwen3 import architecture, reference_model

RECORDS: list[dict[str, Any]] = [
    {"log_probs": [-1.0, -2.0, -0.5], "routes": [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]]]},
    {"log_probs": [-3.0], "routes": [[[1, 2], [3, 4]]]},
]


def moved() -> list[dict[str, Any]]:
    """Log-probs of two of four tokens changed, one slot of one layer of one token, and the order of another's."""
    records = copy.deepcopy(RECORDS)
    records[0]["log_probs"][1] += 0.2
    records[1]["log_probs"][0] -= 0.4
    records[0]["routes"][0][1] = [2, 5]
    records[0]["routes"][1][0] = [5, 4]
    return records


def test_a_difference_is_over_all_tokens_and_the_order_of_slots_is_none() -> None:
    found = difference(RECORDS, moved())
    assert found.log_prob_max == pytest.approx(0.4)
    assert found.log_prob_mean == pytest.approx(0.6 / 4)
    assert found.k3 == pytest.approx((math.exp(0.2) - 1.2 + math.exp(-0.4) - 0.6) / 4)
    assert found.slot_change == pytest.approx(1 / 16)
    assert found.any_layer_flip == pytest.approx(1 / 4)
    assert not found.within(Tolerances(), rounded=False)
    assert not found.within(Tolerances(), rounded=True)
    assert found.within(Tolerances(rounded_k3=0.1), rounded=True)
    assert difference(RECORDS, RECORDS).within(Tolerances(0, 0, 0), rounded=False)


def test_the_sweep_has_every_size_alone_and_in_pairs() -> None:
    assert [str(case) for case in cases(2, ["fp32"], ["auto"])] == [
        "1: plain fp32",
        "2: tensor=2 fp32",
        "2: pipeline=2 fp32",
        "2: expert=2 fp32",
        "2: context=2 fp32",
        "2: tensor=2 expert=2 expert_tensor=1 fp32",
    ]
    assert {case.processes for case in cases(4, ["fp32", "bf16"], ["auto"])} == {1, 2, 4}
    assert parse_layout("tensor=2 pipeline=2 expert=3 expert_tensor=1", ["bf16"], ["local"]) == [
        Case(12, {"tensor": 2, "pipeline": 2, "expert": 3, "expert_tensor": 1}, "bf16", "local")
    ]
    with pytest.raises(ConfigError, match="data=2 is none of tensor=N"):
        parse_layout("data=2", ["fp32"], ["auto"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    reference_model(architecture()).save_pretrained(found)
    return found


def test_cases_that_do_not_fit_are_named_and_those_that_differ_end_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(model: Path, data: Path, case: Case, output: Path) -> list[dict[str, Any]] | str:
        lines = [json.loads(line)["token_ids"] for line in data.read_text().splitlines()]
        assert len(lines) == 8
        assert all(0 <= token < 61 for line in lines for token in line)
        if "context" in case.parallel:
            return "no memory"
        return moved() if "pipeline" in case.parallel else RECORDS

    monkeypatch.setattr(parity, "_run", run)
    layouts = ["tensor=2", "tensor=8", "tensor=3", "pipeline=2", "context=2"]
    asked = [part for layout in layouts for part in ("--layout", layout)]
    assert main(["parity", str(folder), "--processes", "4", "--dtypes", "fp32", *asked]) == 1
    said = capsys.readouterr()
    rows = [line.strip("| ").split(" | ") for line in said.out.splitlines()[2:]]
    found = {row[0]: row[-1] for row in rows}
    assert found["1: plain fp32"] == found["2: tensor=2 fp32"] == "within"
    assert found["8: tensor=8 fp32"] == "left out: needs 8 processes, of 4"
    assert "does not divide the model's num_attention_heads=4" in found["3: tensor=3 fp32"]
    assert found["2: pipeline=2 fp32"] == "OFF"
    assert found["2: context=2 fp32"] == "failed: no memory"
    assert "2 of 6 cases failed or differ by more than allowed: 2: pipeline=2 fp32; 2: context=2 fp32" in said.err
    assert main(["parity", str(folder), "--dtypes", "fp32", "--layout", "tensor=2", "--processes", "2"]) == 0
    bf16 = ["--processes", "2", "--dtypes", "bf16", "--layout", "pipeline=2"]
    assert main(["parity", str(folder), *bf16]) == 1  # k3 0.023
    assert main(["parity", str(folder), *bf16, "--rounded-k3", "0.1"]) == 0
    capsys.readouterr()
    assert main(["parity", str(folder), "--dtypes", "fp32", "--layout", "tensor=8", "--processes", "4"]) == 2
    assert "every case but the first was left out, so nothing was compared" in capsys.readouterr().err


def test_what_score_writes_is_what_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "text.jsonl"
    data.write_text('{"token_ids": [3, 9, 27, 20, 60, 58]}\n{"token_ids": [5, 6, 7]}\n')
    assert main(["parity", str(folder), "--data", str(data), "--processes", "1", "--dtypes", "fp32"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| 1: plain fp32 | 0 | 0 | 0 | 0 | 0 | within |"]


@pytest.mark.slow
def test_real_layouts_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(folder), "--processes", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 12
    assert all(row.endswith("| within |") for row in rows)
