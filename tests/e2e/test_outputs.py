"""What a command cannot write is found before its work starts: exit code 2, one line, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from gspo_moe.cli import USER_ERROR, main
from gspo_moe.parallel.groups import shut_down
from tests.e2e.program import SMALL_MODEL, TASK
from tests.qwen3 import architecture, reference_model
from tests.runs import write_run

READ_ONLY = "which is not writable (Read-only file system); name another"
STUDY = "name: s\nbase: config.yaml\nseeds: [1]\narms: {a: {}}\nonline: {}\nrun_dir: out\n"
COMMANDS = (
    ("train config.yaml logging.run_dir=out/run", "logging.run_dir=out/run"),
    ("score --model model --data in.jsonl --output out/scores", "out/scores"),
    ("bank config.yaml out/bank.safetensors", "out/bank.safetensors"),
    ("convert --from model --to out/megatron", "out/megatron"),
    ("study study.yaml", "study folder out/s"),
    ("report done --output out/page.html", "out/page.html"),
    ("report done --figures out/figures", "out/figures"),
    ("report done --csv out/numbers.csv", "out/numbers.csv"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """A working folder with a model, a config, a study, data, a finished run, and an empty `out`."""
    monkeypatch.chdir(tmp_path)
    reference_model(architecture(vocab_size=301)).save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("model: {hf: model}\ntokenizer: {kind: sentencepiece, vocab_size: 300}\n")
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "in.jsonl").write_text(json.dumps({"token_ids": [1, 2]}) + "\n")
    write_run(tmp_path / "done", lambda step: {"reward/mean": 0.1 * step}, steps=range(1, 3))
    (tmp_path / "out").mkdir()
    capsys.readouterr()
    yield tmp_path
    shut_down()


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command.split()) == USER_ERROR
    assert not dist.is_initialized()
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    return written.err


@pytest.mark.parametrize(("command", "named"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_read_only_place(
    command: str, named: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tempfile.NamedTemporaryFile

    def mounted(*, dir: str | Path | None = None, **rest: Any) -> Any:  # a read-only mount, which root cannot make
        return refuse() if dir is not None and Path(dir).name == "out" else temporary(dir=dir, **rest)

    def refuse() -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", mounted)
    message = refusal(command, capsys)
    assert f": {named} lies below out, {READ_ONLY}" in message.replace(f"{here}/", "")
    assert list((here / "out").iterdir()) == []


def test_a_bank_is_never_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("rollout.prompts_per_step=2", "algorithm.mini_batches=1", "schedule.steps=1", "logging.progress=false")
    command = " ".join(("bank config.yaml out/bank model.hf=null model.preset=tiny", *SMALL_MODEL, *TASK, *short))
    assert main(command.split()) == 0
    shut_down()
    assert capsys.readouterr().out == "out/bank: answers to 2 prompts\n"
    before = (here / "out" / "bank").read_bytes()
    assert "out/bank exists, and runs may rest on its rollouts; name another file, or" in refusal(
        f"{command} seed=2", capsys
    )
    assert (here / "out" / "bank").read_bytes() == before


def test_an_export_that_would_be_refused_at_the_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out" / "hf").mkdir()
    (here / "out" / "hf" / "mine").touch()
    message = refusal("train config.yaml logging.run_dir=out", capsys)
    assert "out/hf exists and was not exported by gspo_moe, so it is not replaced; name another folder" in message
