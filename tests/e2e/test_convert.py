"""`gspo-moe convert`, and a run that starts from its result."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gspo_moe.cli import USER_ERROR, main
from gspo_moe.parallel.groups import shut_down
from tests.e2e.program import TASK, Program, succeed, torchrun
from tests.qwen3 import architecture, reference_model, tensors_in

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """An empty working folder with a model in `hf`."""
    monkeypatch.chdir(tmp_path)
    reference_model(architecture(vocab_size=301)).save_pretrained(tmp_path / "hf")
    capsys.readouterr()
    yield tmp_path
    shut_down()


def test_there_and_back_and_a_run_from_halfway(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = tensors_in(here / "hf")
    assert main(["convert", "--from", "hf", "--to", "megatron", "logging.progress=false"]) == 0
    assert capsys.readouterr().out == f"megatron: {len(expected)} tensors equal those of hf\n"
    (here / "config.yaml").write_text("model: {checkpoint: megatron}\nlogging: {run_dir: run}\n")
    tokenizer = ("tokenizer.kind=sentencepiece", "tokenizer.vocab_size=300")
    short = ("schedule.steps=1", "optimizer.lr=1e-9", "evaluation.prompts=0", "checkpoint.export_hf=false")
    assert main(["train", "config.yaml", "stage=sft", "schedule.sft_batch=8", *tokenizer, *TASK, *short]) == 0
    checkpoint = "run/checkpoints/step_00000001"
    command = ("convert", "--config", "run/config.yaml", "--from", checkpoint, "--to", "again", "tokenizer.path=run")
    outcome = succeed(torchrun(2, "-m", "gspo_moe", *command), here)
    assert outcome.stdout == f"again: {len(expected)} tensors equal those of {checkpoint}\n"
    assert "comparing" in outcome.stderr
    found = tensors_in(here / "again")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-8, rtol=0)
    assert (here / "again" / "tokenizer.model").read_bytes() == (here / "run" / "tokenizer.model").read_bytes()


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert", *arguments]) == USER_ERROR
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err
    return written.err


def test_what_cannot_be_converted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hf exists; name a folder that does not" in refusal(["--from", "hf", "--to", "hf"], capsys)
    assert "model.hf=nowhere" in refusal(["--from", "nowhere", "--to", "there"], capsys)
    (here / "text").mkdir()
    (here / "text" / "metadata.json").write_text("{}")
    assert "model.checkpoint=text: text/config.json does not exist" in refusal(["--from", "text", "--to", "x"], capsys)
    tensors = tensors_in(here / "hf")
    tensors[GATE][1, 2] = float("nan")
    save_file(tensors, here / "hf" / "model.safetensors")
    message = refusal(["--from", "hf", "--to", "there", "logging.progress=false"], capsys)
    assert message.endswith(f"\n  {GATE}: holds values that are not finite\n")
    del tensors[GATE]
    save_file(tensors, here / "hf" / "model.safetensors")
    assert f"\n  {GATE}: missing\n" in refusal(["--from", "hf", "--to", "there"], capsys)
    assert sorted(path.name for path in here.iterdir()) == ["hf", "text"]


def test_every_process_ends_where_one_finds_a_broken_tensor(here: Path) -> None:
    tensors = tensors_in(here / "hf")
    tensors[GATE][1, 2] = float("nan")
    save_file(tensors, here / "hf" / "model.safetensors")
    command = torchrun(2, "-m", "gspo_moe", "convert", "--from", "hf", "--to", "there")
    outcome = Program(command, here).finish()
    assert outcome.code != 0
    assert outcome.left_behind == ()
    assert f"{GATE}: holds values that are not finite" in outcome.stderr
    assert not (here / "there").exists()
