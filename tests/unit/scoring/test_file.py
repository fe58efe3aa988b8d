"""`score_file` in one process, against `score` and the recorder on the same weights."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import SentencePieceTokenizer
from gspo_moe.errors import ConfigError, DataError, RolloutError
from gspo_moe.model.weights import RandomSource
from gspo_moe.parallel.groups import shut_down
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.file import score_file
from gspo_moe.scoring.lines import read_sequences
from gspo_moe.types import TrainingSample
from tests.policy import SIZES, LoudRows, packs_of, score_and_record
from tests.qwen3 import built, layout, random_sequences

# Ragged, out of order of length, with sequences of one token between them.
LENGTHS = (5, 1, 12, 2, 30, 1, 7, 7)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    source = RandomSource(SIZES, seed=4)
    save_file({name: source.get(name) for name in source.shapes()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES.to_hf()))
    return folder


def lines(sequences: Sequence[Sequence[int]]) -> str:
    return "".join(json.dumps({"token_ids": list(ids), "note": "kept out"}) + "\n" for ids in sequences)


def scored(folder: Path, weights: Path, text: str, *, micro_batch_tokens: int = 20, with_routes: bool) -> list[Any]:
    (folder / "in.jsonl").write_text(text)
    config = Config.model_validate(
        {"model": {"hf": str(weights)}, "schedule": {"micro_batch_tokens": micro_batch_tokens}}
    )
    try:
        score_file(config, folder / "in.jsonl", folder / "out.jsonl", with_routes=with_routes)
    finally:
        shut_down()
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_log_probs_that_are_not_finite_are_no_output(tmp_path: Path) -> None:
    source = RandomSource(SIZES, seed=4)
    tensors = {name: source.get(name) for name in source.shapes()}
    tensors["lm_head.weight"][7] = 3e38  # one token's logit overflows
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIZES.to_hf()))
    (tmp_path / "out.jsonl").write_text("as it was")
    with pytest.raises(RolloutError, match=r"in\.jsonl, line 2: the log-prob of token 1 \(from 0\) is (nan|-inf)"):
        scored(tmp_path, tmp_path, lines([[5], [5, 6], [3, 4]]), with_routes=False)
    assert (tmp_path / "out.jsonl").read_text() == "as it was"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 4096])
def test_values_and_routes_are_those_of_scoring_each_sequence_alone(
    micro_batch_tokens: int, weights: Path, tmp_path: Path
) -> None:
    sequences = [ids.tolist() for ids in random_sequences(SIZES, LENGTHS, seed=5)]
    records = scored(tmp_path, weights, lines(sequences), micro_batch_tokens=micro_batch_tokens, with_routes=True)
    long = [ids for ids in sequences if len(ids) > 1]
    packs = packs_of([TrainingSample(tuple(ids), (0,) + (1,) * (len(ids) - 1)) for ids in long], per_pack=1)
    with built(SIZES, layout(), RandomSource(SIZES, seed=4)) as model:
        recorder = RouteRecorder(model.chunks, SIZES, model.groups)
        log_probs, recordings = score_and_record(model, packs, recorder)
    expected = zip(log_probs, recordings, strict=True)
    assert len(records) == len(sequences)
    for ids, record in zip(sequences, records, strict=True):
        if len(ids) == 1:
            assert record == {"log_probs": [], "routes": []}
            continue
        log_probs_T, recording = next(expected)
        torch.testing.assert_close(torch.tensor(record["log_probs"]), log_probs_T, atol=1e-5, rtol=0)
        routes_TLK = recording.routes_TLK.sort(dim=-1).values.int()
        assert torch.equal(torch.tensor(record["routes"], dtype=torch.int32).sort(dim=-1).values, routes_TLK)


def test_rows_that_the_tokenizer_does_not_have_are_left_out(weights: Path, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer.train(["abc"], vocab_size=270)
    sizes = SIZES.model_copy(update={"vocab_size": tokenizer.vocab_size + 30})
    source = LoudRows(sizes, 4, tokenizer.vocab_size)
    folder, run = tmp_path / "hf", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    save_file({name: source.get(name) for name in source.shapes()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(sizes.to_hf()))
    last = tokenizer.vocab_size - 1
    text = lines([[5, token] for token in range(last + 1)])

    def total() -> float:
        return sum(math.exp(record["log_probs"][0]) for record in scored(run, folder, text, with_routes=False))

    assert total() < 0.5  # every row counts where no tokenizer says otherwise
    tokenizer.save(folder)
    (run / "out.jsonl").unlink()
    assert total() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(DataError, match=rf"in\.jsonl, line 2: token ids must lie in \[0, {last + 1}\)"):
        scored(run, folder, lines([[last], [last + 1]]), with_routes=False)
    (folder / "config.json").write_text(json.dumps(sizes.to_hf() | {"vocab_size": last}))
    with pytest.raises(ConfigError, match=f"the tokenizer has {last + 1} tokens and the model's vocab_size is {last}"):
        scored(run, folder, text, with_routes=False)


def test_without_routes_there_are_only_log_probs(weights: Path, tmp_path: Path) -> None:
    (record,) = scored(tmp_path, weights, lines([[1, 2, 3]]), with_routes=False)
    assert record.keys() == {"log_probs"}
    assert len(record["log_probs"]) == 2


@pytest.mark.parametrize("text", ["", lines([[1]]), lines([[1], [2], [3]])])
def test_files_with_nothing_to_predict_give_empty_lists(text: str, weights: Path, tmp_path: Path) -> None:
    assert scored(tmp_path, weights, text, with_routes=False) == [{"log_probs": []}] * text.count("\n")


def read(tmp_path: Path, text: str) -> list[tuple[int, ...]]:
    (tmp_path / "data.jsonl").write_text(text)
    return [line.token_ids for line in read_sequences(tmp_path / "data.jsonl", vocab_size=61, longest=4)]


def test_lines_are_read_in_order(tmp_path: Path) -> None:
    text = '{"token_ids": [3, 1, 2, 60, 0]}\n{"reward": 1.5, "token_ids": [7]}'
    assert read(tmp_path, text) == read(tmp_path, text + "\n") == [(3, 1, 2, 60, 0), (7,)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "not of the form"),
        ("[1, 2]", "not of the form"),
        ("7", "not of the form"),
        ('{"tokens": [1]}', "not of the form"),
        ('{"token_ids": [1]', "not of the form"),
        ('{"token_ids": []}', "must be a list of one integer or more"),
        ('{"token_ids": 5}', "must be a list of one integer or more"),
        ('{"token_ids": "12"}', "must be a list of one integer or more"),
        ('{"token_ids": [1, 2.0]}', "must be a list of one integer or more"),
        ('{"token_ids": [1, true]}', "must be a list of one integer or more"),
        ('{"token_ids": [1, null]}', "must be a list of one integer or more"),
        ('{"token_ids": [1, 61]}', r"must lie in \[0, 61\)"),
        ('{"token_ids": [-1, 3]}', r"must lie in \[0, 61\)"),
        ('{"token_ids": [1, 2, 3, 4, 5, 6]}', "6 tokens exceed the model's 4 positions"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(line: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl, line 2: .*{problem}"):
        read(tmp_path, f'{{"token_ids": [1]}}\n{line}\n{{"token_ids": [1]}}\n')


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        list(read_sequences(tmp_path / "none.jsonl", 61, 4))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.jsonl is not UTF-8 text"):
        list(read_sequences(tmp_path / "binary.jsonl", 61, 4))


def test_an_output_that_cannot_be_written_is_refused_before_any_work(weights: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"hf": str(weights)}})
    for output in (tmp_path, tmp_path / "nowhere" / "out.jsonl"):
        with pytest.raises(DataError, match=r"is a folder; name a file|cannot be written"):
            score_file(config, tmp_path / "in.jsonl", output, with_routes=False)
