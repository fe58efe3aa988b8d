"""Where stop strings end an answer, against looking for them in the text of every prefix."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gspo_moe.data.tokenizers import HFTokenizer, SentencePieceTokenizer, Tokenizer
from gspo_moe.rollout.engine import make_stop_ids
from gspo_moe.rollout.stop_strings import StopStrings, make_stop_strings
from tests.policy import Letters


def first_end(tokenizer: Tokenizer, strings: Sequence[str], ids: Sequence[int]) -> int | None:
    """How many tokens it takes until their text holds a string."""
    texts = (tokenizer.decode(ids[: n + 1]) for n in range(len(ids)))
    return next((n + 1 for n, text in enumerate(texts) if any(one in text for one in strings)), None)


def found_end(stop: StopStrings, ids: Sequence[int]) -> int | None:
    return next((n + 1 for n in range(len(ids)) if stop.ended(ids[: n + 1])), None)


STRINGS = ("</answer>", "\n\n", "é世", "🙂!", " the end", "aa")
TEXTS = (
    "So it is <answer>42</answer> and more",
    "one\n\ntwo",
    "a\n \n\nb",
    "a\n\n\n\nb",
    "né世界",
    "ok 🙂! 🙂",
    "this is the ending",
    "bababaaab",
    "</answer></answer>",
    "nothing of it </answer",
)


@pytest.fixture(scope="module")
def byte_ids(qwen: Path) -> dict[int, int]:
    """The token of each byte."""
    vocabulary = json.loads((qwen / "tokenizer.json").read_text())["model"]["vocab"]
    return {byte: vocabulary[letter] for byte, letter in bytes_to_unicode().items()}


@pytest.mark.parametrize("strings", [STRINGS, STRINGS[3:4]])
def test_answers_end_at_the_token_that_completes_a_string(
    strings: tuple[str, ...], qwen_tokenizer: HFTokenizer, byte_ids: dict[int, int]
) -> None:
    stop = StopStrings(strings, qwen_tokenizer)
    assert len(stop.completing) < 0.06 * qwen_tokenizer.vocab_size
    draw, ends = random.Random(1), 0
    for text in TEXTS:
        whole = qwen_tokenizer.encode(text)
        # The same text as a policy may sample it: in other tokens than the tokenizer's own, down to single bytes.
        loose = [one for part in pieces(text, draw) for one in qwen_tokenizer.encode(part)]
        by_byte = [byte_ids[byte] for byte in text.encode()]
        for ids in (whole, loose, by_byte):
            expected = first_end(qwen_tokenizer, strings, ids)
            assert found_end(stop, ids) == expected
            if expected is not None:
                cut = stop.cut(qwen_tokenizer.decode(ids[:expected]))
                assert cut == min((text.partition(one)[0] for one in strings), key=len)
                ends += 1
    assert ends >= 3


def pieces(text: str, draw: random.Random) -> list[str]:
    cuts = sorted({0, len(text), *(draw.randrange(len(text)) for _ in range(len(text) // 2))})
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def test_characters_of_several_tokens_are_found_when_their_last_byte_comes() -> None:
    trained = SentencePieceTokenizer.train(["plain letters only\n"], 300)
    stop = StopStrings(("é世", "\u2581"), trained)
    for text in ("né世界", "a\u2581b", "é"):
        ids = trained.encode(text)
        assert found_end(stop, ids) == first_end(trained, stop.strings, ids)
    # A token that says nothing may stand inside of a string.
    silent = [*trained.encode("é"), *[trained.eos_id] * 9, *trained.encode("世")]
    assert found_end(stop, silent) == len(silent)


def test_strings_of_one_token_are_also_found_in_others(qwen_tokenizer: HFTokenizer) -> None:
    stop = make_stop_strings(qwen_tokenizer, ("\n", "<|im_end|>"))
    assert stop is not None
    assert stop.strings == ("\n",)  # spelled with other tokens a special token's word is text
    (dot_and_line,) = qwen_tokenizer.encode(".\n")
    assert stop.ended([dot_and_line])
    assert qwen_tokenizer.encode("\n")[0] in make_stop_ids(qwen_tokenizer, ("\n",))


def test_nothing_is_looked_for_where_own_tokens_are_all_that_can_end(qwen_tokenizer: HFTokenizer) -> None:
    assert make_stop_strings(qwen_tokenizer, ()) is None
    assert make_stop_strings(qwen_tokenizer, ("<|im_end|>", "<|endoftext|>")) is None
    digits: Any = Letters()
    assert make_stop_strings(digits, (digits.decode([7]),)) is None
    found = make_stop_strings(digits, (digits.decode([7]), digits.decode([7, 8])))
    assert found is not None
    assert found.completing == {7, 8}
