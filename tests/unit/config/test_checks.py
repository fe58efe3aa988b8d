from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gspo_moe.config import ConfigError, check_files, load_config
from gspo_moe.config.checks import wandb_mode


def _model_folder(tmp_path: Path, *, weights: bool = True) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    architecture = load_config(None).model.architecture(vocab_size=64)
    (folder / "config.json").write_text(json.dumps(architecture.to_hf()))
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


def _message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_files(load_config(None, overrides))
    return str(caught.value)


def test_a_complete_folder_and_the_defaults_pass(tmp_path: Path) -> None:
    check_files(load_config(None))
    check_files(load_config(None, [f"model={{hf: {_model_folder(tmp_path)}}}"]))


def test_missing_model_folder_is_named(tmp_path: Path) -> None:
    message = _message(f"model={{hf: {tmp_path}/nowhere}}")
    assert f"model.hf={tmp_path}/nowhere" in message
    assert "does not exist; give the folder" in message


def test_folder_without_config_json_is_named(tmp_path: Path) -> None:
    assert "config.json does not exist" in _message(f"model={{hf: {tmp_path}, random_init: true}}")


def test_weights_are_needed_unless_random(tmp_path: Path) -> None:
    folder = _model_folder(tmp_path, weights=False)
    message = _message(f"model={{hf: {folder}}}")
    assert f"model.hf={folder} holds no *.safetensors" in message
    assert "model.random_init=true" in message
    check_files(load_config(None, [f"model={{hf: {folder}, random_init: true}}"]))


def test_overrides_that_break_the_folders_sizes_are_named(tmp_path: Path) -> None:
    message = _message(f"model={{hf: {_model_folder(tmp_path)}, overrides: {{num_key_value_heads: 3}}}}")
    assert "model.overrides" in message
    assert "num_key_value_heads=3; choose a divisor" in message


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"tokenizer.path={tmp_path}/t.model does not exist; give" in _message(f"tokenizer.path={tmp_path}/t.model")
    check_files(load_config(None, [f"tokenizer.path={tmp_path}"]))


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    message = _message("model={preset: tiny, overrides: {vocab_size: 100}}", "tokenizer.vocab_size=512")
    assert message == "tokenizer.vocab_size=512 exceeds the model's vocab_size=100; lower it to that"


def test_responses_longer_than_the_model_are_refused() -> None:
    message = _message("rollout.max_response_tokens=1024")
    assert "rollout.max_response_tokens=1024" in message
    assert "max_position_embeddings=1024; lower it" in message


def test_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert f"logging.run_dir={file} is a file; name a folder" in _message(f"logging.run_dir={file}")


def test_missing_wandb_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install wandb" in _message("logging.wandb.project=x")


WANDB_VARIABLES = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")


@pytest.fixture
def wandb_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The netrc that it reads, which is not there yet."""
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_without_a_key_is_refused_before_anything_starts(
    wandb_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = "logging.wandb.project=x"
    assert _message(project).startswith(
        "logging.wandb would go online and finds no key; run `wandb login`, set WANDB_A"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "finds no key" in _message(project, "logging.wandb.mode=online")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DISABLED", "true"), ("WANDB_API_KEY", "k")):
        with monkeypatch.context() as given:
            given.delenv("WANDB_MODE")
            given.setenv(name, value)
            check_files(load_config(None, [project]))
    monkeypatch.delenv("WANDB_MODE")
    check_files(load_config(None, [project, "logging.wandb.mode=offline"]))
    wandb_installed.write_text("machine elsewhere login a password b\n")
    assert "finds no key" in _message(project)
    wandb_installed.write_text("machine api.wandb.ai login user password k\n")
    check_files(load_config(None, [project]))


@pytest.mark.parametrize(
    ("given", "environment", "mode"),
    [
        ("null", {}, "online"),
        ("null", {"WANDB_MODE": "offline"}, "offline"),
        ("null", {"WANDB_MODE": "offline", "WANDB_DISABLED": "true"}, "disabled"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_the_environments_wandb_mode_holds_unless_the_config_says_one(
    given: str, environment: dict[str, str], mode: str, wandb_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_config(None, [f"logging.wandb={{project: x, mode: {given}}}"]).logging.wandb
    assert settings is not None
    assert wandb_mode(settings) == mode


def test_all_that_is_missing_comes_in_one_message(tmp_path: Path) -> None:
    message = _message(f"model={{hf: {tmp_path}/a}}", f"tokenizer.path={tmp_path}/b")
    assert [line.split("=")[0] for line in message.splitlines()] == ["model.hf", "tokenizer.path"]
