"""What is shown of a config and of a run's first prompt, and how a command ends whose output nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.cli import main
from gspo_moe.config.loading import load_config
from gspo_moe.config.schema import Config
from gspo_moe.config.task import RewardConfig
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import HFTokenizer
from gspo_moe.tasks import make_task
from gspo_moe.training import shown
from gspo_moe.training.session import Plan

CONFIG = """
tokenizer: {path: QWEN}
chat: {system: Sort., thinking: false}
rollout: {stop: [</answer>, "<|im_end|>"]}
parallel: {tensor: 2}
model: {preset: tiny, backend: transformer_engine}
logging: {run_dir: RUN}
"""


def test_doctor_tells_a_configs_template_stops_reward_and_first_prompt(
    qwen: Path, qwen_tokenizer: HFTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.replace("QWEN", str(qwen)).replace("RUN", str(tmp_path / "run")))
    assert main(["doctor", str(file), "task.options.min_length=5"]) == 0
    table, prompt = capsys.readouterr().out.split("\n\n", 1)
    values = {line.split("  ")[0]: line.partition("  ")[2].strip() for line in table.splitlines()}
    assert values["task"] == "sort_letters (train without end, sft without end, eval without end)"
    assert values["tokenizer"] == "HFTokenizer, 151,669 tokens"
    assert values["chat template"] == f"{qwen / 'chat_template.jinja'} (chat.template=auto)"
    assert values["chat settings"].startswith("system='Sort.', thinking=False, words of special tokens")
    assert values["stop tokens"] == "151643 '<|endoftext|>', 151645 '<|im_end|>'"
    assert values["stop strings"] == "'</answer>'"
    assert values["reward"] == "the task's own, SortLetters"
    assert values["environment"] == "none: one answer a prompt"
    first, *read = prompt.splitlines()
    assert first.startswith("prompt train/0 as the model reads it, ")
    text = "\n".join(line.removeprefix("| ") for line in read)
    assert text.startswith("<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert f", {len(qwen_tokenizer.encode(text))} tokens, " in first
    assert not (tmp_path / "run").exists()


def plan(tokenizer: HFTokenizer, prompt: str = "", **sections: Any) -> Plan:
    config = Config.model_validate(sections)
    nothing: Any = None
    task = make_task(config.task, config.seed)
    return Plan(config, nothing, nothing, Renderer(tokenizer, config.chat), task)


def test_a_template_whose_end_of_an_answer_stops_nothing_is_warned_of(
    qwen_tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "warning" not in shown.show_prompt(plan(qwen_tokenizer))
    monkeypatch.setattr(qwen_tokenizer, "eos_ids", (151643,))  # as of the base model
    told = shown.show_prompt(plan(qwen_tokenizer))
    assert told.endswith("ends an answer with '<|im_end|>', at which no rollout stops; add it to rollout.stop")
    assert "warning" not in shown.show_prompt(plan(qwen_tokenizer, rollout={"stop": ["<|im_end|>"]}))
    assert "warning" not in shown.show_prompt(plan(qwen_tokenizer, chat={"template": "none"}))


def test_a_long_prompt_is_shown_by_its_ends(qwen_tokenizer: HFTokenizer) -> None:
    told = shown.show_prompt(plan(qwen_tokenizer, chat={"system": "a" * 5000 + "b"}))
    shown_characters = len(told.partition("\n")[2])
    assert "\n| ... 1,0" in told
    assert shown_characters < 4100
    assert told.endswith("| <|im_start|>assistant\n| ")


def test_rewards_are_named_with_their_weights_and_options(qwen_tokenizer: HFTokenizer) -> None:
    task = plan(qwen_tokenizer).task
    terms = [{"name": "math", "weight": 0.5}, {"name": "length", "options": {"most": 9}}]
    for given, told in (({"sum": terms}, "0.5 math + 1 length (most=9)"), ({"name": "own.py:f"}, "own.py:f")):
        assert shown._reward(RewardConfig.model_validate(given), task) == told


def test_a_command_whose_output_nobody_reads_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = "from gspo_moe import cli; cli._doctor = lambda _: print('told'); raise SystemExit(cli.main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_config_for_evaluation_alone_shows_a_held_out_prompt(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "2 + 2 =", "answer": "4"}\n')
    given = ("model=tiny", "task.reward=exact", f"task.data.eval={file}", "evaluation.prompts=all")
    assert "prompt eval/asked/1 as the model reads it" in shown.describe(load_config(None, given))
