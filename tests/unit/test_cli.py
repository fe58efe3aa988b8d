"""What the command line says under a launcher of several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_moe.cli import LAUNCHER_ERROR_FILE, main


def test_the_first_rank_that_fails_explains_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (1, 0):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv(LAUNCHER_ERROR_FILE, str(file))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert main(["train", str(tmp_path / "missing.yaml")]) == 2
        told = capsys.readouterr().err
        assert ("gspo-moe: ConfigError: " in told) is (rank == 1)
        assert json.loads(file.read_text())["message"]["message"].startswith("gspo-moe: ConfigError: ")
