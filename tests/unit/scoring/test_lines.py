"""Scoring of text and messages: the values of their token ids, and which of these an assistant says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import HFTokenizer
from gspo_moe.errors import DataError
from gspo_moe.parallel.groups import shut_down
from gspo_moe.scoring.file import score_file
from gspo_moe.scoring.lines import read_sequences
from tests.chatml import END, SIZES, chatml_model
from tests.qwen3 import reference_logits, reference_model

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "It is seven."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatml_model(tmp_path_factory.mktemp("chatml"))


def test_all_kinds_of_lines_are_scored_as_transformers_scores_their_ids(model: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"text": "hello, é"}, {"token_ids": [5, 6, 7], "text": "unread"}, {"messages": CHAT}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        score_file(
            Config.model_validate({"model": {"hf": str(model)}}),
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            with_routes=False,
        )
    finally:
        shut_down()
    text, ids, chat = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    tokenizer = HFTokenizer(model)
    assert tokenizer.decode(text["token_ids"]) == "hello, é"
    assert text["mask"] == [1] * len(text["token_ids"])
    assert ids.keys() == {"log_probs"}
    whole = tokenizer.decode(chat["token_ids"])
    assert whole.startswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n")
    said = [token for token, on in zip(chat["token_ids"], chat["mask"], strict=True) if on]
    assert tokenizer.decode(said) == f"4{END}It is seven.{END}"
    sequences = [torch.tensor(one) for one in (text["token_ids"], [5, 6, 7], chat["token_ids"])]
    logits = reference_logits(reference_model(SIZES), sequences)
    for record, sequence, logits_TV in zip((text, ids, chat), sequences, logits, strict=True):
        expected = logits_TV[:-1].double().log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
        assert record["log_probs"] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"text": ""}, "there is no token in it"),
        ({"text": 5}, "text must be text"),
        ({"text": "a", "messages": CHAT}, "text and messages are both given"),
        ({"messages": []}, r"its messages is \[\], not a list of messages"),
        ({"messages": [{"role": "user"}]}, r"its messages\[0\].content is missing"),
        (
            {"messages": [*CHAT, {"role": "user", "content": "a", "tool_calls": [{}]}]},
            "has tool_calls, which is",
        ),
        ({"messages": CHAT, "tools": "calculator"}, "its tools is text that is no JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: Any, problem: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f'{{"token_ids": [1]}}\n{json.dumps(line)}\n')
    with pytest.raises(DataError, match=rf"data\.jsonl, line 2: .*{problem}"):
        list(read_sequences(tmp_path / "data.jsonl", 300, 100, Renderer(HFTokenizer(model))))


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"line 1: text needs a tokenizer .* set tokenizer\.path"):
        list(read_sequences(tmp_path / "data.jsonl", 300, 100))
