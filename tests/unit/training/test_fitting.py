"""What is found out about a user's prompts before a run starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_moe.config.loading import load_config
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.training.preflight import preflight
from gspo_moe.training.session import Plan

# One token a character: the tokenizer is trained on the prompts. Lines 2 and 4 are the long ones.
LENGTHS = (4, 90, 5, 70, 6)


def settled(folder: Path, *overrides: str, lengths: tuple[int, ...] = LENGTHS, trains: bool = True) -> Plan:
    file = folder / "mine.jsonl"
    lines = [{"prompt": "ab"[n % 2] * length, "answer": "b" * 10} for n, length in enumerate(lengths)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = (
        f"task.data.train={file}",
        "task.reward=exact",
        "evaluation.prompts=0",
        "rollout.max_response_tokens=8",
        f"logging.run_dir={folder}/run",
    )
    return preflight(load_config(None, [*common, *overrides]), trains=trains)


ERRORS = {
    "rollout.max_prompt_tokens=80": r"1 of 5 prompts of split 'train' are longer than rollout\.max_prompt_tokens=80, "
    r"the first is .*mine\.jsonl, line 2 with 90 tokens; raise that, or set rollout\.long_prompts to drop or truncate",
    "rollout.max_prompt_tokens=7": r"2 of 5 prompts .* line 2 with 90 tokens",
    "schedule.micro_batch_tokens=80": r"1 of 5 .* than the 72 tokens that rollout\.max_response_tokens=8 leaves of "
    r"schedule\.micro_batch_tokens=80, .* line 2 with 90",
    "stage=sft schedule.micro_batch_tokens=79": r"2 of 5 .* longer than schedule\.micro_batch_tokens=79 with their "
    r"demonstrations, .* line 2 with 100 tokens; raise that, or set rollout\.long_prompts=drop",
    "stage=sft rollout.max_prompt_tokens=80": r"1 of 5 .*, or than rollout\.max_prompt_tokens=80 without, .* line 2",
}


@pytest.mark.parametrize("changed", ERRORS)
def test_a_prompt_without_room_is_named_before_anything_starts(changed: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=ERRORS[changed]):
        settled(tmp_path, *changed.split())


@pytest.mark.parametrize(("rank", "split"), [("0", "train"), ("1", "sft")])
def test_long_prompts_can_be_left_out_and_are_counted_once(
    rank: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    stage = "rl" if split == "train" else "sft"
    limits = ("schedule.micro_batch_tokens=75", "rollout.long_prompts=drop")
    prompts = settled(tmp_path, f"stage={stage}", *limits).task.prompts
    assert prompts.size(split) == 3
    assert [len(prompts.prompt(split, index).text) for index in range(3)] == [4, 5, 6]
    said = capsys.readouterr().err
    assert ("2 of 5 prompts of split 'train' are longer than the 67" in said) is (rank == "0")
    assert ("and are left out, the first is" in said) is (rank == "0")


def test_long_prompts_can_be_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = settled(tmp_path, "rollout.max_prompt_tokens=20", "rollout.long_prompts=truncate_left")
    prompt = plan.task.prompts.prompt("train", 1)
    assert (plan.task.prompts.size("train"), plan.renderer.max_prompt_tokens) == (5, 20)
    assert plan.renderer.prompt(prompt) == plan.tokenizer.encode(prompt.text[-20:])
    assert "2 of 5 prompts of split 'train'" in capsys.readouterr().err


def test_what_training_reads_is_not_cut_by_what_evaluation_leaves(tmp_path: Path) -> None:
    evaluation = ("evaluation.prompts=2", "evaluation.max_response_tokens=30", "task.data.held_out=2")
    cut = ("schedule.micro_batch_tokens=100", "rollout.long_prompts=truncate_left")
    with pytest.raises(ConfigError, match=r"prompts to 92 tokens, .*=30 leaves 70; set .*_tokens=70"):
        settled(tmp_path, *evaluation, *cut)
    assert settled(tmp_path, *evaluation, *cut, "rollout.max_prompt_tokens=70").renderer.max_prompt_tokens == 70
    assert settled(tmp_path, *cut).renderer.max_prompt_tokens == 92


def test_where_all_are_too_long_or_too_few_are_left_that_is_said(tmp_path: Path) -> None:
    drop = ("rollout.max_prompt_tokens=3", "rollout.long_prompts=drop")
    with pytest.raises(DataError, match=r"5 of 5 prompts .* so that none is left; raise that"):
        settled(tmp_path, *drop)
    evaluation = ("rollout.max_prompt_tokens=5", "rollout.long_prompts=drop", "evaluation.prompts=3")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts=3 exceeds the 2 held-out prompts"):
        settled(tmp_path, *evaluation, f"task.data.eval={tmp_path}/mine.jsonl")


def test_held_out_prompts_are_looked_at_where_they_are_asked_for(tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 99, "answer": "a"}) + "\n")
    limit, held_out = "rollout.max_prompt_tokens=90", f"task.data.eval={long}"
    assert settled(tmp_path, limit, held_out).task.prompts.size("eval") == 1
    with pytest.raises(DataError, match=r"1 of 1 prompts of split 'eval' .*long\.jsonl, line 1 with 99 tokens"):
        settled(tmp_path, limit, held_out, "evaluation.prompts=1")


def test_evaluation_alone_needs_no_prompts_of_training(tmp_path: Path) -> None:
    changed = (f"task.data={{eval: {tmp_path}/mine.jsonl}}", "evaluation.prompts=all")
    assert settled(tmp_path, *changed, trains=False).task.prompts.size("eval") == 5
    with pytest.raises(ConfigError, match=r"no prompts in its split 'train'; .*task\.data\.train"):
        settled(tmp_path, *changed)


def test_without_held_out_prompts_the_three_ways_out_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.data\.eval.*task\.data\.held_out.*evaluation\.prompts=0"):
        settled(tmp_path, "evaluation.prompts=512")


def test_records_that_are_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settled(tmp_path, "task.data.on_bad_record=skip", lengths=(4, 0, 5))
    assert "1 records of split 'train' cannot be read and are left out, the first: " in capsys.readouterr().err


UNREWARDED = (
    "task.reward={}",
    "task.reward=task",
    "task.reward=[{name: exact}, {name: task}]",
    "task={data: {train: [{path: FILE, reward: exact}, {path: FILE}]}}",
)


@pytest.mark.parametrize("changed", UNREWARDED)
def test_prompts_of_files_need_a_reward(changed: str, tmp_path: Path) -> None:
    changed = changed.replace("FILE", str(tmp_path / "mine.jsonl"))
    with pytest.raises(
        ConfigError, match=r"nothing rewards the answers to the prompts of task\.data; set task\.reward"
    ):
        settled(tmp_path, changed)


def test_demonstrations_need_none_and_each_record_has_one(tmp_path: Path) -> None:
    settled(tmp_path, "stage=sft", "task.reward={}")
    file = tmp_path / "two.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": null}\n')
    with pytest.raises(
        ConfigError, match=r"two\.jsonl, line 2 has no demonstration for stage sft; it has prompt, answer"
    ):
        settled(tmp_path, "stage=sft", f"task.data.sft={file}")
