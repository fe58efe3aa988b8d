"""What `gspo-moe eval` makes of a config, with and without a file of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.training.evaluation import evaluate_alone, evaluation_config

ROOT = Path(__file__).parents[3]
OWN = {
    "train": [{"path": "train.jsonl", "format": "gsm8k", "columns": {"answer": "solution"}, "weight": 2.0, "limit": 3}],
    "held_out": 5,
    "system": "Be brief.",
    "columns": {"prompt": "question"},
}


def config(folder: Path, *overrides: str, data: str | None = "mine.jsonl", **sections: Any) -> Any:
    (folder / "config.yaml").write_text(json.dumps({"seed": 3, **sections}))
    return evaluation_config(str(folder / "config.yaml"), overrides, data)


def test_a_file_is_read_as_the_configs_own(tmp_path: Path) -> None:
    found = config(tmp_path, task={"data": OWN, "reward": "math"}, evaluation={"prompts": 7, "samples": 4})
    assert found.evaluation.prompts == "all"
    assert found.evaluation.samples == 4
    assert found.task.reward.name == "math"
    data = found.task.data
    assert (data.train, data.sft, data.held_out, data.system) == ((), (), 0, "Be brief.")
    (file,) = data.eval
    assert file.model_dump() == {
        "path": "mine.jsonl", "split": None, "format": "gsm8k", "columns": {"answer": "solution"}, "weight": None,
        "reward": None, "limit": None,
    }  # fmt: skip
    aime = config(tmp_path, task={"data": {**OWN, "held_out": 0, "eval": {"path": "x", "format": "aime"}}}).task.data
    assert [(file.path, file.format) for file in aime.eval] == [("mine.jsonl", "aime")]


def test_another_task_becomes_one_of_the_file(tmp_path: Path) -> None:
    task = {"name": "sort_letters", "options": {"min_length": 2}, "reward": "own.py:reward"}
    found = config(tmp_path, task=task).task
    assert (found.name, found.options, found.reward.name) == ("data", {}, "own.py:reward")
    assert [file.path for file in found.data.eval] == ["mine.jsonl"]
    assert config(tmp_path, data=None, task=task).task.name == "sort_letters"


@pytest.mark.parametrize("override", ["evaluation.prompts=9", "evaluation={prompts: 9, samples: 2}"])
def test_a_number_of_prompts_that_is_asked_for_counts(override: str, tmp_path: Path) -> None:
    assert config(tmp_path, override, task={"data": OWN}).evaluation.prompts == 9
    assert config(tmp_path, "evaluation={samples: 2}", task={"data": OWN}).evaluation.prompts == "all"


@pytest.mark.parametrize(
    ("name", "samples", "tokens"), [("aime24", 32, 38912), ("livecodebench", 8, 32768), ("codeforces", 8, 32768)]
)
def test_the_recipes_sample_as_the_report_of_qwen3(name: str, samples: int, tokens: int) -> None:
    found = evaluation_config(str(ROOT / "examples" / f"eval_{name}.yaml"), ["model.hf=somewhere"], "own.jsonl")
    asked = found.evaluation
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.6, 0.95, 20)
    assert (asked.samples, asked.max_response_tokens, asked.prompts) == (samples, tokens, "all")
    assert found.task.data is not None
    (file,) = found.task.data.eval
    assert (file.path, file.format) == ("own.jsonl", name.removesuffix("24"))


def test_what_there_is_to_evaluate_and_where_it_goes_is_checked_first(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("earlier")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts=0 leaves nothing"):
        evaluate_alone(config(tmp_path, data=None, evaluation={"prompts": 0}), None)
    with pytest.raises(ConfigError, match=r"out\.jsonl exists"):
        evaluate_alone(config(tmp_path, data=None), tmp_path / "out.jsonl")
