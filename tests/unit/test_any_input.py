"""Whatever stands in a user's files: it is read, or refused with one of our errors; nothing else is ever raised.

A few hundred examples a kind, the same ones every time; `-m slow` has thousands.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gspo_moe.config.architecture import Architecture, architecture_from_hf
from gspo_moe.config.data import DataConfig, DataFile
from gspo_moe.config.loading import as_override, load_config, save_config
from gspo_moe.config.schema import Config
from gspo_moe.data.end_tokens import read_end_tokens
from gspo_moe.data.tokenizers import SentencePieceTokenizer
from gspo_moe.errors import GspoMoeError
from gspo_moe.model.weights import SafetensorsSource
from gspo_moe.report.build import build_report
from gspo_moe.rollout.bank import read_bank
from gspo_moe.scoring.lines import read_sequences
from gspo_moe.study.spec import load_study
from gspo_moe.tasks.files.prompts import FilePrompts
from tests.runs import write_run

RUNS = Path(__file__).parents[1] / "runs_before"
FEW = settings(
    max_examples=100, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True, database=None
)
MANY = settings(FEW, max_examples=3000)
REAL_CONFIG = (RUNS / "run" / "config.yaml").read_bytes()
HF = json.loads((RUNS / "start" / "config.json").read_text())

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1 << 31, 1 << 64, 10**30, 1e308, 1e-320])
TEXTS = st.text(max_size=12) | st.sampled_from(["", "\0", "\ud800", "=1+1", "../x", "auto", "gspo", "a" * 300])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


KEYS = tuple(_keys(Config().model_dump(mode="json")))
HF_KEYS = (*HF, "rope_parameters", "eos_token_id", "num_local_experts", "quantization_config", "layer_types")


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with some bytes changed, left out or put in, or cut off."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        found = bytearray(content)
        for start, length, new in edits:
            at = start % (len(found) + 1)
            found[at : at + length] = new
        return bytes(found)

    edit = st.tuples(st.integers(0, 1 << 20), st.integers(0, 3) | st.just(1 << 20), st.binary(max_size=4))
    return st.lists(edit, max_size=3).map(change)


def as_json(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: json.dumps(value).encode())


def changed(values: dict[str, Any], keys: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=2).map(lambda new: {**values, **new})


def refused_or(read: Callable[[], Any]) -> Any:
    """What `read` gives; None where it is refused with a message that has words and an end."""
    try:
        return read()
    except GspoMoeError as error:
        message = str(error)
    assert 0 < len(message) < 5000
    return None


def config_tree(values: dict[str, Any]) -> None:
    """A config that is taken comes back from its own file as it was."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        config = refused_or(lambda: load_config(None, [as_override(key, value) for key, value in values.items()]))
        if config is not None:
            save_config(config, file)
            assert load_config(file) == config


def config_text(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(content)
        refused_or(lambda: load_config(file))
        refused_or(lambda: load_study(file))


def config_json(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "generation_config.json"):
            (Path(folder) / name).write_bytes(content)
        found = refused_or(lambda: architecture_from_hf(folder))
        if found is not None:
            sizes = [value for value in found.model_dump().values() if not isinstance(value, bool | dict | None)]
            assert all(0 < value < 1 << 40 for value in sizes)
            assert Architecture.model_validate(found.model_dump()) == found
        refused_or(lambda: read_end_tokens(Path(folder)))


def prompt_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("prompts.jsonl", "prompts.json"):
            (Path(folder) / name).write_bytes(content)
            data = DataConfig(train=(DataFile(path=str(Path(folder) / name)),))
            prompts = refused_or(partial(FilePrompts, data, seed=1))
            for index in range(0 if prompts is None else refused_or(partial(prompts.size, "train")) or 0):
                prompts.prompt("train", index).shown.encode()


def scored_lines(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.jsonl"
        file.write_bytes(content)
        for line in refused_or(lambda: list(read_sequences(file, 61, 128))) or ():
            assert all(0 <= token < 61 for token in line.token_ids)


def tokenizer_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(content)
        tokenizer = refused_or(lambda: SentencePieceTokenizer.load(file))
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("abc"))


def run_folder(files: dict[str, bytes]) -> None:
    """A report is whole, or refused and not there."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", lambda step: {"reward/mean": 0.1 * step}, steps=range(1, 4))
        for name, content in files.items():
            (run / name).write_bytes(content)
        page, numbers = Path(folder) / "page.html", Path(folder) / "numbers.csv"
        if refused_or(lambda: build_report([run], output=page, csv=numbers)) is None:
            assert sorted(one.name for one in Path(folder).iterdir()) == ["run"]
        else:
            assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
            assert not any(line.startswith(("=", "+", "-", "@")) for line in numbers.read_text().splitlines())


def weight_index(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"a": np.zeros(2, np.float32)}, Path(folder) / "1.safetensors")
        (Path(folder) / "model.safetensors.index.json").write_bytes(content)
        source = refused_or(lambda: SafetensorsSource(folder))
        assert source is None or dict(source.shapes()) == {"a": (2,)}


def bank_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.safetensors"
        file.write_bytes(content)
        refused_or(lambda: read_bank(file))


def lines_of(*records: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.lists(st.one_of(*map(as_json, records)), min_size=1, max_size=3).map(b"\n".join)


METRICS = st.fixed_dictionaries({"step": st.integers(0, 9) | VALUES}, optional={"reward/mean": VALUES, "time": VALUES})
SAMPLES = st.fixed_dictionaries(
    {"step": st.integers(0, 9)},
    optional=dict.fromkeys(("prompt", "messages", "turns", "reward", "reward_parts", "advantage", "finish"), VALUES),
)
PROMPTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "question", "answer", "messages", "tools", "system", "tests"), VALUES)
)
LINES = st.fixed_dictionaries({}, optional=dict.fromkeys(("token_ids", "text", "messages", "tools"), VALUES))
RUN_FILES = st.one_of(
    st.fixed_dictionaries({"metrics.jsonl": lines_of(METRICS)}),
    st.fixed_dictionaries({"samples.jsonl": lines_of(SAMPLES), "starts.jsonl": lines_of(METRICS)}),
    st.fixed_dictionaries({"config.yaml": damaged(REAL_CONFIG)}),
    st.fixed_dictionaries({"config.yaml": as_json(st.dictionaries(st.sampled_from(KEYS[:20]), VALUES, max_size=3))}),
    st.fixed_dictionaries({"metrics.jsonl": damaged((RUNS / "run" / "metrics.jsonl").read_bytes())}),
    st.fixed_dictionaries(
        {"routing_layers.safetensors": damaged((RUNS / "run" / "routing_layers.safetensors").read_bytes()[:4000])}
    ),
)
KINDS: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any]]] = {
    "config trees": (config_tree, st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)),
    "config text": (
        config_text,
        damaged(REAL_CONFIG)
        | st.binary(max_size=60)
        | st.text("{}[]:-!&*<>|?#'\" \nabc1.", max_size=60).map(str.encode)
        | VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=False).encode()),
    ),
    "config.json": (
        config_json,
        as_json(changed(HF, HF_KEYS)) | as_json(VALUES) | damaged(json.dumps(HF).encode()) | st.binary(max_size=40),
    ),
    "prompts": (prompt_file, lines_of(PROMPTS, VALUES) | damaged(b'{"prompt": "a", "answer": "b"}\n' * 3)),
    "scored lines": (scored_lines, lines_of(LINES, VALUES) | damaged(b'{"token_ids": [1, 2, 3]}\n' * 3)),
    "tokenizer.model": (
        tokenizer_bytes,
        damaged((RUNS / "start" / "tokenizer.model").read_bytes()) | st.binary(max_size=60),
    ),
    "run folders": (run_folder, RUN_FILES),
    "weight indices": (
        weight_index,
        as_json(st.fixed_dictionaries({"weight_map": st.dictionaries(st.just("a") | TEXTS, VALUES, max_size=2)}))
        | as_json(VALUES)
        | damaged(b'{"weight_map": {"a": "1.safetensors"}}'),
    ),
    "banks": (bank_file, damaged((RUNS / "bank.safetensors").read_bytes()) | st.binary(max_size=60)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_input_is_read_or_refused(kind: str) -> None:
    check, inputs = KINDS[kind]
    FEW(given(inputs)(check))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_inputs_are_read_or_refused(kind: str) -> None:
    check, inputs = KINDS[kind]
    MANY(given(inputs)(check))()
