from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gspo_moe.config.model import TokenizerConfig
from gspo_moe.data.tokenizers import HFTokenizer, SentencePieceTokenizer, load_tokenizer, own_tokenizer
from gspo_moe.errors import ConfigError, DataError

LETTERS = ["".join(Random(seed).choices(string.ascii_lowercase, k=12)) + ">" for seed in range(50)]
ODD = [
    "",
    " ",
    "  two  spaces  ",
    "line\nbreaks\r\n\n\ttabs\t",
    "\u2581 the space mark \u2581\u2581",
    "é and e\u0301 stay apart",
    "日本語 العربية",
    "👨\u200d👩\u200d👧 \U0010ffff",
    "\0 nothing \0\x01\x7f\x85",
    "<0x41> </s> <unk> <s>",
    "\ufeff\u200b\u2028\u3000ﬁ①\ufffd",
]


def never_asked() -> NoReturn:
    raise AssertionError("no tokenizer is to be trained here")


@pytest.fixture(scope="module")
def letters() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(LETTERS, vocab_size=512)


@pytest.mark.parametrize("texts", [LETTERS, [text for text in ODD if text], ["a"]], ids=["letters", "odd", "a"])
@pytest.mark.parametrize("vocab_size", [260, 512])
def test_any_text_comes_back_exactly(texts: list[str], vocab_size: int) -> None:
    tokenizer = SentencePieceTokenizer.train(texts, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    random = Random(0)
    planes = (range(128), range(0x3000), [*range(0xD800), *range(0xE000, 0x110000)])
    for text in ODD + ["".join(chr(random.choice(random.choice(planes))) for _ in range(20)) for _ in range(200)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eos_id for token in ids)


def test_letters_are_single_pieces_and_the_vocabulary_is_as_small_as_they_need(letters: SentencePieceTokenizer) -> None:
    ids = letters.encode("qebaz>")
    assert len(ids) == len(set(ids)) == 6
    assert letters.decode(ids[2:4]) == "ba"
    assert letters.vocab_size == 26 + len("> ") + 256 + len(["unknown", "end"])


def test_a_small_vocabulary_leaves_the_rarest_characters_to_bytes() -> None:
    tokenizer = SentencePieceTokenizer.train(["aaab", "aac"], vocab_size=260)
    assert len(tokenizer.encode("a")) == len(tokenizer.encode("b")) == 1
    assert tokenizer.vocab_size == 260
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


def test_bytes_that_are_no_text_are_shown_as_such(letters: SentencePieceTokenizer) -> None:
    assert letters.decode(letters.encode("a") + letters.encode("é")[:1]) == "a\ufffd"


def test_training_gives_the_same_model_each_time_and_says_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        SentencePieceTokenizer.train(iter(LETTERS), 512).save(tmp_path / name)
    one, two = ((tmp_path / name / "tokenizer.model").read_bytes() for name in ("one", "two"))
    assert one == two
    assert capfd.readouterr() == ("", "")


def test_a_saved_model_loads_as_the_same_tokenizer(letters: SentencePieceTokenizer, tmp_path: Path) -> None:
    letters.save(tmp_path / "deep" / "folder")
    loaded = SentencePieceTokenizer.load(tmp_path / "deep" / "folder" / "tokenizer.model")
    for text in ODD:
        assert loaded.encode(text) == letters.encode(text)
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (letters.eos_id, letters.pad_id, letters.vocab_size)
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == ["tokenizer.model"]


def test_what_cannot_be_trained_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=259 .*at least 260"):
        SentencePieceTokenizer.train(LETTERS, 259)
    for nothing in ([], [""], ["  "]):
        with pytest.raises(DataError, match=r"no tokenizer can be trained .*set tokenizer\.path"):
            SentencePieceTokenizer.train(nothing, 512)
    (tmp_path / "tokenizer.model").write_text("no model")
    for path in (tmp_path / "tokenizer.model", tmp_path / "missing.model"):
        with pytest.raises(DataError, match="no readable SentencePiece model"):
            SentencePieceTokenizer.load(path)


def hf_folder(folder: Path, files: dict[str, Any]) -> Path:
    """A byte-level BPE as Qwen's, with the tokens <end>, <pad> and <turn>, and `files` beside it."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>", "<turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to merge, some more text"] * 4, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def test_an_hf_tokenizer_neither_cuts_nor_pads_nor_hides_special_tokens(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(
        hf_folder(tmp_path, {"tokenizer_config.json": {"eos_token": "<end>", "pad_token": "<pad>"}})
    )
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<turn>") == [2]
    assert tokenizer.decode([2, *tokenizer.encode("some text"), tokenizer.eos_id]) == "<turn>some text<end>"
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 1)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_size == reference.get_vocab_size()


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({"tokenizer_config.json": {"eos_token": "<end>"}, "generation_config.json": {"eos_token_id": 2}}, (0, 2)),
        ({"tokenizer_config.json": {"eos_token": "<end>"}, "generation_config.json": {"eos_token_id": [2, 0]}}, (0, 2)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<turn>", "lstrip": False}}}, (2,)),
        ({"tokenizer_config.json": {"eos_token": None}, "generation_config.json": {"eos_token_id": [2, 0]}}, (2, 0)),
        ({"generation_config.json": {"eos_token_id": 2}, "config.json": {"eos_token_id": 1}}, (2,)),
        ({"special_tokens_map.json": {"eos_token": {"content": "<turn>"}}}, (2,)),
    ],
)
def test_the_end_tokens_are_found_where_hf_writes_them_and_survive_saving(
    files: dict[str, Any], eos_ids: tuple[int, ...], tmp_path: Path
) -> None:
    tokenizer = HFTokenizer(hf_folder(tmp_path / "one", files))
    assert tokenizer.eos_id == tokenizer.pad_id == eos_ids[0]
    assert tokenizer.eos_ids == eos_ids
    tokenizer.save(tmp_path / "two")
    saved = HFTokenizer(tmp_path / "two")
    assert saved.eos_ids == eos_ids
    assert saved.encode("some more text") == tokenizer.encode("some more text")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "names no end-of-text token; set eos_token in its tokenizer_config.json"),
        ({"tokenizer_config.json": {"eos_token": "<absent>"}}, "names no end-of-text token"),
        ({"tokenizer_config.json": ["eos_token"]}, "is no JSON object"),
        (
            {
                "tokenizer_config.json": {"eos_token": "<end>"},
                "generation_config.json": {"eos_token_id": [0, 300, 7000]},
            },
            r"generation_config\.json: eos_token_id=\[300, 7000\] is outside the tokenizer's 2\d\d tokens; correct it",
        ),
        ({"config.json": {"eos_token_id": -1}}, r"/config\.json: eos_token_id=\[-1\] is outside the tokenizer"),
        ({"config.json": {"eos_token_id": ["<end>"]}}, "eos_token_id=.*is neither an id nor a list of ids; correct it"),
        ({"generation_config.json": {"eos_token_id": True}}, "eos_token_id=True is neither an id"),
    ],
)
def test_an_hf_tokenizer_without_an_end_says_what_to_set(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        HFTokenizer(hf_folder(tmp_path, files))


def test_an_hf_tokenizer_with_ids_that_no_token_has_is_refused(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "<end>": 9}
    tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"up to id 9 and none for 7 ids below it \(2, 3, 4, 5, 6, \.\.\.\)"):
        HFTokenizer(tmp_path)


def test_end_tokens_come_from_the_tokenizers_folder_and_else_from_the_models(
    letters: SentencePieceTokenizer, tmp_path: Path
) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    letters.save(model)
    (model / "config.json").write_text('{"eos_token_id": [4, 3]}')
    found = own_tokenizer(TokenizerConfig(), model)
    assert found is not None
    assert (found.eos_id, found.eos_ids) == (letters.eos_id, (letters.eos_id, 4, 3))
    letters.save(other)
    for path in (other, other / "tokenizer.model"):
        found = own_tokenizer(TokenizerConfig(path=str(path)), model)
        assert found is not None
        assert found.eos_ids == (letters.eos_id, 4, 3)
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    found = own_tokenizer(TokenizerConfig(path=str(other)), model)
    assert found is not None
    assert found.eos_ids == (letters.eos_id, 5)
    (other / "generation_config.json").write_text('{"eos_token_id": 5000}')
    with pytest.raises(DataError, match=r"eos_token_id=\[5000\] is outside the tokenizer's"):
        own_tokenizer(TokenizerConfig(path=str(other)), model)


def test_a_broken_hf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no readable tokenizer"):
        HFTokenizer(tmp_path)


@pytest.fixture
def both_kinds(letters: SentencePieceTokenizer, tmp_path: Path) -> Path:
    letters.save(tmp_path / "model")
    return hf_folder(tmp_path / "model", {"tokenizer_config.json": {"eos_token": "<end>"}})


def test_an_explicit_path_comes_before_the_models_folder(both_kinds: Path, tmp_path: Path) -> None:
    other = SentencePieceTokenizer.train(["xyz"], 512)
    other.save(tmp_path / "other")
    for path in (tmp_path / "other", tmp_path / "other" / "tokenizer.model"):
        found = load_tokenizer(TokenizerConfig(path=str(path)), both_kinds, never_asked, tmp_path / "run")
        assert found.vocab_size == other.vocab_size
    assert not (tmp_path / "run").exists()


def test_the_models_folder_decides_by_kind(both_kinds: Path, tmp_path: Path) -> None:
    found = {
        kind: load_tokenizer(TokenizerConfig(kind=kind), both_kinds, never_asked, tmp_path / "run")
        for kind in ("auto", "hf", "sentencepiece")
    }
    assert isinstance(found["auto"], HFTokenizer)
    assert isinstance(found["hf"], HFTokenizer)
    assert isinstance(found["sentencepiece"], SentencePieceTokenizer)
    (both_kinds / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(TokenizerConfig(), both_kinds, never_asked, tmp_path), SentencePieceTokenizer)


def test_without_any_a_tokenizer_is_trained_and_saved(letters: SentencePieceTokenizer, tmp_path: Path) -> None:
    def texts() -> Iterable[str]:
        return iter(LETTERS)

    trained = load_tokenizer(TokenizerConfig(), None, texts, tmp_path / "run")
    assert trained.encode("abc") == letters.encode("abc")
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path / "run")), None, never_asked, tmp_path / "other")
    assert again.encode("abc") == letters.encode("abc")


def test_a_tokenizer_that_was_asked_for_and_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.path=.* with tokenizer\.kind=hf holds no such tokenizer"):
        load_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path)), None, never_asked, tmp_path)
    for kind, folder in (("hf", None), ("hf", tmp_path), ("auto", tmp_path)):
        with pytest.raises(ConfigError, match=r"set tokenizer\.path to one, or tokenizer\.kind=sentencepiece"):
            load_tokenizer(TokenizerConfig.model_validate({"kind": kind}), folder, never_asked, tmp_path)
