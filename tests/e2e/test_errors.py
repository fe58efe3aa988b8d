"""What goes wrong says so in one message: bad input before any process group starts, a failing rank within seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from gspo_moe.cli import USER_ERROR, main
from tests.e2e.program import SMALL_MODEL, SMALL_RL, Program, gspo_moe, torchrun
from tests.qwen3 import architecture, reference_model

# Processes, arguments after `train config.yaml`, and what the message must hold: key with value, and the fix.
CONFIGS = (
    (1, "optimizer.lrr=1", ("optimizer.lrr=1", "optimizer.lr")),
    (1, "paralel.expert=2", ("paralel=", "nearest valid key is parallel")),
    (1, "schedule.steps=many", ("schedule.steps='many'", "expected a valid integer")),
    (1, "model=tinny", ("model.preset='tinny'", "known are tiny, small, qwen3_30b_a3b")),
    (1, "model.dtype=fp8", ("model.dtype='fp8'", "expected 'fp32' or 'bf16'")),
    (1, "model={hf: nowhere}", ("model.hf=nowhere", "does not exist; give the folder")),
    (1, "model={hf: .}", ("model.hf=.", "config.json does not exist; give the folder")),
    (
        1,
        "model={checkpoint: nowhere}",
        ("model.checkpoint=nowhere", "no distributed checkpoint", "gspo-moe convert"),
    ),
    (1, "model={checkpoint: ., random_init: true}", ("model.random_init=true", "name its folder in model.hf")),
    (1, "model.overrides.num_attention_heads=3", ("num_attention_heads=3", "num_key_value_heads=2; choose a divisor")),
    (1, "task.name=sort_leters", ("task.name=sort_leters", "the nearest is sort_letters")),
    (1, "task.options.min_lenght=3", ("task.options.min_lenght=3", "task.options.min_length")),
    (1, "rollout.prompts_per_step=30", ("rollout.prompts_per_step=30", "algorithm.mini_batches=4; change one")),
    (1, "rollout.stop=['']", ("rollout.stop: ''", "leave it out")),
    (1, "algorithm.clip_high=0.2", ("algorithm.clip_high=0.2", "or set algorithm.allow_wide_clip=true")),
    (
        1,
        "algorithm.name=reinforce",
        ("algorithm.name='reinforce'", "did you mean 'minirl'?", "gspo, gspo_token, luspo, minirl, ppo"),
    ),
    (1, "optimizer.min_lr=1", ("optimizer.min_lr=1", "exceeds optimizer.lr=0.0001; lower it")),
    (1, "tokenizer.path=nowhere", ("tokenizer.path=nowhere", "give an existing tokenizer, or null")),
    (1, "logging.run_dir=config.yaml", ("logging.run_dir=config.yaml is a file", "name a folder")),
    (1, "logging.run_dir=config.yaml/run", ("logging.run_dir=config.yaml/run", "is a file; name a folder")),
    (1, "seed", ("override 'seed'", "section.key=value")),
    (1, "parallel.expert=2", ("parallel.expert=2", "does not divide the 1 processes", "start a multiple of 2")),
    (3, "parallel.expert=3 rollout.prompts_per_step=36", ("parallel.expert=3", "num_experts=16; set", "1 or 2")),
    (2, "parallel.tensor=2 parallel.expert=2", ("= 4 does not divide the 2 processes", "nearest layouts that work")),
    (1, "parallel.context=2", ("parallel.context=2", "does not divide the 1 processes", "start a multiple of 2")),
)
DATA = (
    (None, ("does not exist; give a file of lines",)),
    (b'{"token_ids": [1, 2]}\n{"token_ids": 7}\n', ("line 2", "token_ids must be a list")),
    (b'{"token_ids": [1, 2]}\n{"tokens": [1]}\n', ("line 2", 'not of the form {"token_ids": [...]}')),
    (b'{"token_ids": [1, 2', ("line 1", 'not of the form {"token_ids": [...]}')),
    (b'{"token_ids": [1, 61]}\n', ("line 1", "must lie in [0, 61)")),
    (b'{"token_ids": [-1]}\n', ("line 1", "must lie in [0, 61)")),
    (json.dumps({"token_ids": [3] * 130}).encode(), ("line 1", "130 tokens exceed the model's 128 positions")),
    (b"\xff\xfe\x00", ("is not UTF-8 text",)),
)
FAILING_RANK = """
import os, sys, warnings

if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        from gspo_moe import cli
        from gspo_moe.training import loop
    rl_step = loop.rl_step

    def failing_step(trainer):
        if os.environ["RANK"] == "1" and trainer.progress.step == 1:
            raise RuntimeError("expert 7 is on fire")
        return rl_step(trainer)

    loop.rl_step = failing_step
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("model: tiny\nlogging: {run_dir: run}\n")
    return tmp_path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must be refused with one message, which is returned, and without a process group."""
    assert main(arguments) == USER_ERROR
    assert not dist.is_initialized()
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("gspo-moe: ")
    assert written.err.count("gspo-moe: ") == 1
    assert "Traceback" not in written.err
    return written.err


@pytest.mark.parametrize(("processes", "overrides", "expected"), CONFIGS, ids=[case[1] for case in CONFIGS])
def test_a_config_that_cannot_work(
    processes: int,
    overrides: str,
    expected: tuple[str, ...],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = [overrides] if "{" in overrides else overrides.split()
    message = refusal(["train", "config.yaml", *given], capsys)
    assert [part for part in expected if part not in message] == []
    assert not (here / "run" / "metrics.jsonl").exists()


def test_a_config_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.yaml").write_text("seed: 1\nmodel: [tiny\n")
    assert "nowhere.yaml: No such file" in refusal(["train", "nowhere.yaml"], capsys)
    assert "broken.yaml, line 3" in refusal(["train", "broken.yaml"], capsys)


def test_nothing_to_evaluate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evaluation.prompts=0" in refusal(["eval", "config.yaml", "evaluation.prompts=0"], capsys)


def test_data_that_cannot_be_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference_model(architecture()).save_pretrained(here / "model")
    capsys.readouterr()
    command = ["score", "--model", "model", "--data", "in.jsonl", "--output"]
    for content, expected in DATA:
        if content is not None:
            (here / "in.jsonl").write_bytes(content)
        message = refusal([*command, "out.jsonl"], capsys)
        assert [part for part in ("in.jsonl", *expected) if part not in message] == []
    assert "nowhere/out.jsonl cannot be written" in refusal([*command, "nowhere/out.jsonl"], capsys)
    assert "model.hf=nowhere" in refusal(["score", "--model", "nowhere", *command[3:], "out.jsonl"], capsys)
    assert not (here / "out.jsonl").exists()


def test_doctor_tells_of_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = ("python", "device", "torch", "megatron-core", "Transformer Engine", "NVIDIA Apex", "kernels", "nvcc")
    found = {part: line.removeprefix(part).split() for line in lines for part in parts if line.startswith(f"{part}  ")}
    assert found.keys() == set(parts)
    assert all(found.values())
    # What is absent comes with what that means.
    assert all("-" in words for part, words in found.items() if words[0] == "absent" and part != "nvcc")


def test_a_plain_start_ends_with_exit_code_2(here: Path) -> None:
    outcome = Program(gspo_moe("train", "config.yaml", "model.dtype=fp8"), here).finish()
    assert (outcome.code, outcome.stdout) == (USER_ERROR, "")
    assert outcome.stderr == "gspo-moe: ConfigError: model.dtype='fp8': expected 'fp32' or 'bf16'\n"


def test_under_torchrun_the_message_comes_last(here: Path) -> None:
    command = torchrun(2, "-m", "gspo_moe", "train", "config.yaml", "parallel.expert=3")
    outcome = Program(command, here).finish()
    assert outcome.code != 0
    assert outcome.left_behind == ()
    message = "gspo-moe: ConfigError: parallel.pipeline=1 * parallel.expert=3"
    *_, said, _, nearest, border = outcome.stderr.splitlines()
    assert border.strip("=") == ""
    assert f"traceback : {message}" in said
    assert "nearest layouts that work with 2 processes: parallel.expert=2" in nearest
    # The ranks themselves say it once, without a stack trace.
    assert outcome.stderr.startswith(message)
    assert '"/gspo_moe/' not in outcome.stderr


def test_a_failing_rank_ends_the_job_with_its_error_last(here: Path) -> None:
    (here / "failing.py").write_text(FAILING_RANK)
    command = torchrun(2, "failing.py", "train", "config.yaml", *SMALL_MODEL, *SMALL_RL, "parallel.expert=2")
    outcome = Program(command, here).finish()
    assert outcome.code != 0
    assert outcome.left_behind == ()
    assert "step 1/8" in outcome.stderr
    root_cause = outcome.stderr.rpartition("Root Cause")[2]
    assert "rank      : 1" in root_cause
    assert "RuntimeError: expert 7 is on fire" in root_cause
    assert "Connection closed" not in outcome.stderr
