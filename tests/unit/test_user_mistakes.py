"""What a user may get wrong outside of a config's own keys: one message with a fix, never a stack trace."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gspo_moe.cli import USER_ERROR, main

RUNS = Path(__file__).parents[1] / "runs_before"
LONG = "a" * 5000
DEEP = 100_000


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a run and lines to score."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUNS / "start", tmp_path / "model")
    shutil.copytree(RUNS / "run", tmp_path / "run")
    (tmp_path / "rl.yaml").write_text((RUNS / "rl.yaml").read_text().replace("start", "model"))
    shutil.copyfile(RUNS / "bank.safetensors", tmp_path / "bank.safetensors")
    (tmp_path / "in.jsonl").write_text('{"token_ids": [1, 2, 3]}\n')
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must end with one message, which is returned, and write nothing."""

    def run(*arguments: str) -> str:
        before = sorted(here.rglob("*"))
        assert main(arguments) == USER_ERROR
        message = capsys.readouterr().err
        assert message.count("gspo-moe: ") == 1
        assert sorted(here.rglob("*")) == before
        assert len(message) < 3000
        return message

    return run


CHECK = ("train", "rl.yaml", "--check", "model={hf: model}", "logging.run_dir=new")
OUTPUTS = {
    "report --output": ("report", "run", "--output"),
    "report --csv": ("report", "run", "--csv"),
    "report --figures": ("report", "run", "--figures"),
    "score": ("score", "--model", "model", "--data", "in.jsonl", "--output"),
    "convert": ("convert", "--from", "model", "--to"),
    "bank": ("bank", "rl.yaml"),
    "eval": ("eval", "rl.yaml", "model={hf: model}", "--output"),
}
NOWHERE = {"/proc/x": "/proc", LONG: "too long", f"new/{LONG[:300]}/x": "too long", "run/config.yaml/x": "is a file"}


@pytest.mark.parametrize("place", NOWHERE, ids=lambda place: str(place)[:12])
@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_that_cannot_be_written(command: str, place: str, refused: Any) -> None:
    assert NOWHERE[place] in refused(*OUTPUTS[command], place)


@pytest.mark.parametrize("place", NOWHERE, ids=lambda place: str(place)[:12])
def test_run_folders_that_cannot_be_written(place: str, refused: Any) -> None:
    assert NOWHERE[place] in refused(*CHECK[:-1], f"logging.run_dir={place}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", LONG, "--output", "page.html"),
        ("score", "--model", LONG, "--data", "in.jsonl", "--output", "out.jsonl"),
        ("score", "--model", "model", "--data", LONG, "--output", "out.jsonl"),
        ("convert", "--from", LONG, "--to", "converted"),
        (*CHECK, f"tokenizer.path={LONG}"),
        (*CHECK, f"chat.template={LONG}"),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_inputs_with_names_that_are_too_long(arguments: tuple[str, ...], refused: Any) -> None:
    assert "too long" in refused(*arguments)


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_ports_that_are_none(port: str, refused: Any) -> None:
    assert f"--port {port} is no port; choose one from 1 to 65535" in refused(
        "report", "run", "--watch", "--port", port
    )


ARCHITECTURES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rope_theta": float("inf")}, "rope_theta=inf: expected a finite number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: expected a finite number"),
    ({"rms_norm_eps": 1e30}, "rms_norm_eps=1e+30"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True: neither true nor false"),
    ({"num_hidden_layers": "many"}, "num_hidden_layers='many': expected a valid integer"),
    ({"hidden_size": 10**30}, "hidden_size=1000"),
    ({"eos_token_id": 10_000_000}, "eos_token_id=10000000 is outside vocab_size"),
    ({"eos_token_id": -1}, "eos_token_id=-1 is neither an id nor a list of ids"),
    ({"eos_token_id": True}, "eos_token_id=True is neither an id nor a list of ids"),
    ({"eos_token_id": [1, "2"]}, "is neither an id nor a list of ids"),
    ({"architectures": 7}, "architectures=7 is no list of names"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": "x"}}, "two whole"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 9}}, "factor=1e+308"),
)


@pytest.mark.parametrize(("change", "expected"), ARCHITECTURES, ids=lambda each: str(each)[:30])
def test_sizes_that_are_nonsense(change: dict[str, Any], expected: str, here: Path, refused: Any) -> None:
    file = here / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert expected in refused(*CHECK)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rope_theta=.inf", "rope_theta=inf: expected a finite number"),
        ("rms_norm_eps=.inf", "rms_norm_eps=inf: expected a finite number"),
        ("num_hidden_layers=true", "num_hidden_layers=True: neither true nor false"),
    ],
)
def test_overrides_that_are_nonsense(override: str, expected: str, refused: Any) -> None:
    assert expected in refused("train", "rl.yaml", "--check", "model={preset: tiny}", f"model.overrides.{override}")


JSON: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "no object": (b"[]", "a list, no keys with values"),
    "no JSON": (b"{", "Expecting"),
    "deep": (b'{"a":' * DEEP, "more than 100 deep"),
    "deep but closed": (b'{"a":' * 500 + b"1" + b"}" * 500, "more than 100 deep"),
    "digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "4300 digits"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", JSON)
def test_json_files_that_are_none(content: str, file: str, here: Path, refused: Any) -> None:
    (here / "model" / file).write_bytes(JSON[content][0])
    message = refused(*CHECK)
    assert file in message
    assert JSON[content][1] in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"token_ids": [' + "9" * 5000 + "]}", "4300 digits"),
        ('{"token_ids": [99999999999999999999]}', "must lie in [0,"),
        ("[" * DEEP, "more than 100 deep"),
        ('{"text": "\\ud800"}', "half of a character"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a character"),
    ],
    ids=lambda each: each[:20],
)
def test_lines_that_cannot_be_scored(line: str, expected: str, here: Path, refused: Any) -> None:
    (here / "in.jsonl").write_text(line + "\n")
    message = refused("score", "--model", "model", "--data", "in.jsonl", "--output", "out.jsonl")
    assert "in.jsonl, line 1" in message
    assert expected in message


@pytest.mark.parametrize(
    "weight_map",
    [{"a": 0}, {"a": None}, [], {}, 0, {"a": "../model.safetensors"}, {"a": ""}, {"a": "\ud800"}, {"\udfff": "x"}],
)
def test_an_index_that_names_no_files(weight_map: Any, here: Path, refused: Any) -> None:
    (here / "model" / "model.safetensors").unlink()
    (here / "model" / "x.safetensors").write_bytes(b"")
    (here / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refused("convert", "--from", "model", "--to", "converted")
    assert "model.safetensors.index.json is no index of safetensors" in message


@pytest.mark.parametrize(
    "bank",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"sampling": 1, "groups": [], "rollouts": [], "has_routes": false}',
        '{"sampling": {"vocab_size": "x"}, "groups": [], "rollouts": [], "has_routes": false}',
        '{"sampling": {"vocab_size": 9}, "groups": 3, "rollouts": [], "has_routes": false}',
    ],
)
def test_a_bank_with_damaged_metadata(bank: str | None, here: Path, refused: Any) -> None:
    metadata = {"format": "gspo_moe bank 2"} | ({} if bank is None else {"bank": bank})
    save_file(load_file(here / "bank.safetensors"), here / "bank.safetensors", metadata=metadata)
    assert "bank.safetensors is a damaged bank" in refused(*CHECK, "rollout.bank=bank.safetensors")


YAML = {
    "algorithm: null": "algorithm=None: expected a section",
    "a: " + "[" * 5000: "more than 100 deep",
    "a: " + "[" * DEEP: "more than 100 deep",
    "- " * 5000: "more than 100 deep",
    "a: &a [*a]": "stands within itself",
    "task: {options: &a {b: *a}}": "stands within itself",
    "\n".join(["a: &a0 [1,1,1,1,1,1,1,1]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 8}]" for n in range(1, 30))]): "aliases",
    "seed: " + "9" * 5000: "4300 digits",
    "seed: !!int x": "cannot be read as tag:yaml.org,2002:int",
    "seed: !!bool x": "cannot be read as tag:yaml.org,2002:bool",
    "seed: !!timestamp x": "cannot be read as tag:yaml.org,2002:timestamp",
    "seed: !!set x": "expected a mapping node",
    'model: {hf: "\\ud800"}': "half of a character",
    'logging: {run_dir: "a\\0b"}': "null",
}


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20].encode("unicode_escape").decode())
def test_yaml_that_is_nonsense(text: str, here: Path, refused: Any) -> None:
    (here / "config.yaml").write_text(text)
    assert YAML[text] in refused("train", "config.yaml", "--check")


def test_overrides_that_are_too_deep(refused: Any) -> None:
    assert "more than 100 deep" in refused(*CHECK, "task.options.a=" + "[" * 5000)
    assert "sections; no key lies as deep" in refused(*CHECK, "a" + ".b" * 5000 + "=1")


def test_a_tokenizer_that_is_none(here: Path, refused: Any) -> None:
    file = here / "model" / "tokenizer.model"
    whole = file.read_bytes()
    for content in (b"", b"\xff" * 100, whole[: len(whole) // 2], b"\0" * 1000):
        file.write_bytes(content)
        assert "tokenizer.model is no readable SentencePiece model" in refused(*CHECK)


@pytest.mark.parametrize("arms", [None, 3, "gspo", True])
def test_a_summary_without_arms(arms: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "run", here / "study" / "gspo" / "seed1")
    (here / "study" / "summary.json").write_text(json.dumps({"arms": arms}))
    assert main(["report", "study", "--csv", "numbers.csv"]) == 0
    assert "summary.json is torn or damaged" in capsys.readouterr().out


def test_what_is_written_has_the_mode_of_the_umask(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0o027)
    try:
        assert main(["report", "run", "--csv", "numbers.csv", "--output", "page.html"]) == 0
    finally:
        os.umask(before)
    capsys.readouterr()
    assert [(here / name).stat().st_mode & 0o777 for name in ("numbers.csv", "page.html")] == [0o640, 0o640]
