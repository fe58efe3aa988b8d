"""The recipes of examples/eval_*.yaml on small files made as the public ones are."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.cli import main
from gspo_moe.config.schema import Config
from gspo_moe.tasks import make_task
from gspo_moe.tasks.protocol import Task
from gspo_moe.training.evaluation import evaluation_config
from tests.chatml import chatml_model
from tests.e2e.program import ROOT, json_lines
from tests.turns import answered

AIME = [
    {"id": 60, "problem": "Find $33 \\cdot 10 + 3$.", "solution": "...", "answer": "333", "year": "2024"},
    {"id": 61, "problem": "Find $5^2$.", "solution": "...", "answer": "025", "year": "2024"},
]
CASES = [{"input": f"{a} {b}\n", "output": f"{a + b}\n", "testtype": "stdin"} for a, b in ((1, 2), (30, 12))]
FUNCTION = [{"input": "[3, 1, 2]", "output": "3", "testtype": "functional"}]
LIVECODEBENCH = [
    {
        "question_title": "Sum",
        "question_content": "Print the sum of two integers.",
        "question_id": "abc1_a",
        "platform": "atcoder",
        "starter_code": "",
        "public_test_cases": json.dumps(CASES[:1]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES[1:])))).decode(),
        "metadata": "{}",
    },
    {
        "question_title": "Largest",
        "question_content": "Return the largest number.",
        "question_id": "1",
        "platform": "leetcode",
        "starter_code": "class Solution:\n    def largest(self, numbers: list[int]) -> int:\n        ",
        "public_test_cases": json.dumps(FUNCTION),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "largest"}),
    },
]
CODEFORCES = [
    {
        "id": "1/A",
        "title": "Sum",
        "description": "Print the sum of two integers.",
        "input_format": "Two integers.",
        "output_format": "Their sum.",
        "time_limit": 2.0,
        "memory_limit": 256.0,
        "examples": [{key: case[key] for key in ("input", "output")} for case in CASES[:1]],
        "official_tests": [{key: case[key] for key in ("input", "output")} for case in CASES[1:]],
    }
]
SUM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
NOT_SUM = "```python\nprint(3)\n```"  # right in the example alone
LARGEST = "```python\nclass Solution:\n    def largest(self, numbers):\n        return max(numbers)\n```"
NOT_LARGEST = LARGEST.replace("max", "min")


def recipe(name: str, records: list[dict[str, Any]], folder: Path, *overrides: str) -> tuple[Config, Task]:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = evaluation_config(str(ROOT / "examples" / f"eval_{name}.yaml"), overrides, str(file))
    return config, make_task(config.task, config.seed)


@pytest.mark.parametrize(
    ("name", "records", "answers"),
    [
        ("aime24", AIME, [("It is \\boxed{333}.", "\\boxed{332}"), ("So \\boxed{25}", "25 or \\boxed{52}")]),
        ("livecodebench", LIVECODEBENCH, [(SUM, NOT_SUM), (LARGEST, NOT_LARGEST)]),
        ("codeforces", CODEFORCES, [(SUM, NOT_SUM)]),
    ],
)
def test_right_answers_are_right_and_wrong_ones_wrong(
    name: str, records: list[dict[str, Any]], answers: list[tuple[str, str]], tmp_path: Path
) -> None:
    fallback = () if name == "aime24" else ("task.reward.options.allow_without_bubblewrap=true",)
    _, task = recipe(name, records, tmp_path, *fallback)
    assert task.prompts.size("eval") == len(records)
    for number, (right, wrong) in enumerate(answers):
        prompt = task.prompts.prompt("eval", number)
        for text, expected in ((right, 1.0), (wrong, 0.0)):
            found = task.rubric.reward(prompt, answered(text))
            assert (found if isinstance(found, float) else found.get("reward", sum(found.values()))) == expected


def test_a_recipe_runs_and_keeps_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = recipe("aime24", AIME, tmp_path)
    model = chatml_model(tmp_path / "hf")
    assert config.task.data is not None
    small = ("model.dtype=fp32", "parallel={}", "chat.thinking=null", "evaluation.max_response_tokens=8")
    more = ("evaluation.samples=3", "evaluation.pass_at=[2]", "rollout.max_response_tokens=8")
    command = ["eval", str(ROOT / "examples" / "eval_aime24.yaml"), "--data", config.task.data.eval[0].path]
    output = tmp_path / "answers.jsonl"
    run = f"logging.run_dir={tmp_path / 'run'}"
    assert main([*command, "--output", str(output), f"model.hf={model}", *small, *more, run]) == 0
    printed = capsys.readouterr().out
    assert "eval/accuracy 0\n" in printed
    assert "eval/pass_at/2 0\n" in printed
    first, second = json_lines(output)
    assert first["prompt"].startswith("Find $33 \\cdot 10 + 3$.\nPlease reason step by step")
    assert (first["reference"]["answer"], second["reference"]["answer"]) == ("333", "25")
    assert [len(one["answers"]) for one in (first, second)] == [3, 3]
    assert not any("error" in answer for one in (first, second) for answer in one["answers"])
