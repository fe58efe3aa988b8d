"""`gspo-moe score` against transformers, alone and split over processes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import FinishedRun
from tests.e2e.program import gspo_moe, json_lines, succeed, torchrun

LENGTHS = (9, 1, 2, 30, 17, 3, 24)  # in no order, one with nothing to score, more than one pack, odd in number
LAYOUTS = {"expert": ["parallel.expert=2"], "tensor": ["parallel.tensor=2", "parallel.expert_tensor=2"]}


@pytest.fixture(scope="module")
def sequences(one_process: FinishedRun) -> list[list[int]]:
    random = Random(1)
    vocab_size = json.loads((one_process.path / "hf" / "config.json").read_text())["vocab_size"]
    return [[random.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]


def arguments(one_process: FinishedRun, sequences: list[list[int]], folder: Path) -> list[str | Path]:
    lines = (json.dumps({"token_ids": ids, "text": "a line\u2028of two"}, ensure_ascii=False) for ids in sequences)
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = ("--model", one_process.path / "hf", "--data", "in.jsonl", "--output", "out.jsonl")
    return ["score", *files, "--routes", "schedule.micro_batch_tokens=32"]


@pytest.fixture(scope="module")
def scored(
    one_process: FinishedRun, sequences: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The records that one process writes."""
    folder = tmp_path_factory.mktemp("score")
    outcome = succeed(gspo_moe(*arguments(one_process, sequences, folder)), folder)
    assert outcome.stdout + outcome.stderr == ""
    return json_lines(folder / "out.jsonl")


def test_log_probs_and_routes_are_those_of_transformers(
    one_process: FinishedRun, sequences: list[list[int]], scored: list[dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(one_process.path / "hf")
    assert [len(record["log_probs"]) for record in scored] == [length - 1 for length in LENGTHS]
    for ids, record in zip(sequences, scored, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_router_logits=True)
        log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert record["log_probs"] == pytest.approx(log_probs.tolist(), abs=1e-4)
        topk = model.config.num_experts_per_tok
        routes = torch.stack([logits[:-1].topk(topk).indices.sort().values for logits in output.router_logits], dim=1)
        assert [[sorted(layer) for layer in token] for token in record["routes"]] == routes.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_model_gives_the_same(
    layout: str, one_process: FinishedRun, sequences: list[list[int]], scored: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = ["-m", "gspo_moe", *arguments(one_process, sequences, tmp_path), *LAYOUTS[layout]]
    succeed(torchrun(2, *command), tmp_path)
    for mine, expected in zip(json_lines(tmp_path / "out.jsonl"), scored, strict=True):
        assert mine["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-5)
        assert [[set(layer) for layer in token] for token in mine["routes"]] == [
            [set(layer) for layer in token] for token in expected["routes"]
        ]
