"""Texts of a user as batches of tokens, by any tokenizer of transformers.

Batches are [rows, tokens], padded on the right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_moe.errors import DataError

FORMS = '{"text": "..."}, {"prompt": "...", "response": "..."}, {"messages": [...]} or {"token_ids": [...]}'


@dataclass(frozen=True)
class Row:
    """One text. start: of the response, whose tokens alone count; 0 where all do."""

    token_ids: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, response_mask: int64 [rows, tokens]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        width = max(len(row.token_ids) for row in rows)
        ids, attention, response = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        for index, row in enumerate(rows):
            length = len(row.token_ids)
            ids[index, :length] = torch.tensor(row.token_ids)
            attention[index, :length] = 1
            response[index, row.start : length] = 1
        return cls(ids, attention, response)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.response_mask.to(device))


def encode(tokenizer: Any, text: str, prompt: str = "") -> Row:
    """The tokens of a text, of which all count, or of a prompt and a response behind it."""
    if not prompt:
        return Row(tuple(tokenizer(text)["input_ids"]))
    ahead = tokenizer(prompt)["input_ids"]
    return Row((*ahead, *tokenizer(text, add_special_tokens=False)["input_ids"]), len(ahead))


def batches(rows: Sequence[Row], token_budget: int) -> list[Batch]:
    """In order, as many rows a batch as fit with their padding; a row longer than the budget has one to itself."""
    found: list[list[Row]] = []
    width = 0
    for row in rows:
        width = max(width, len(row.token_ids))
        if found and width * (len(found[-1]) + 1) <= token_budget:
            found[-1].append(row)
        else:
            found.append([row])
            width = len(row.token_ids)
    return [Batch.of(chosen) for chosen in found]


def read_rows(file: Path, tokenizer: Any, vocabulary: int, longest: int) -> list[Row]:
    """A row for each line of a JSONL file, cut to `longest` tokens where token ids of a text are more.

    Raises DataError, naming the line, for what is not of `FORMS`, ids outside the vocabulary, and a response of fewer
    than two tokens, of which nothing can be measured.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a file of lines {FORMS}")
    rows = []
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file}, line {number}"
        row = _row(line, tokenizer, where)
        row = Row(row.token_ids[:longest], row.start)
        if not all(0 <= token < vocabulary for token in row.token_ids):
            raise DataError(f"{where}: token ids must lie in [0, {vocabulary}), the models' vocabulary")
        if len(row.token_ids) - row.start < 2:
            raise DataError(f"{where}: fewer than two tokens of a response in the first {longest}; leave the line out")
        rows.append(row)
    if not rows:
        raise DataError(f"{file} is empty; give one line {FORMS} or more")
    return rows


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text ({error}); give lines {FORMS}") from error


def _row(line: str, tokenizer: Any, where: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); give {FORMS}") from error
    if isinstance(values, dict):
        ids = values.get("token_ids")
        if isinstance(ids, list) and all(type(token) is int for token in ids):
            return Row(tuple(ids))
        if tokenizer is None and any(key in values for key in ("text", "response", "messages")):
            raise DataError(f"{where}: the first model's folder has no tokenizer for text; give token_ids, or add one")
        text, prompt = values.get("text", values.get("response")), values.get("prompt", "")
        if isinstance(text, str) and isinstance(prompt, str):
            return encode(tokenizer, text, prompt)
        messages = values.get("messages")
        if isinstance(messages, list) and messages:
            return _conversation(messages, tokenizer, where)
    raise DataError(f"{where}: not of the form {FORMS}")


def _conversation(messages: list[Any], tokenizer: Any, where: str) -> Row:
    """Its last message is the response."""
    try:
        ahead = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # of a template, which may do anything
        raise DataError(f"{where}: the tokenizer's chat template cannot render it ({error})") from error
    if not whole.startswith(ahead):
        raise DataError(f"{where}: this template changes the text before the last message; give prompt and response")
    ids = tokenizer(ahead, add_special_tokens=False)["input_ids"]
    return Row((*ids, *tokenizer(whole[len(ahead) :], add_special_tokens=False)["input_ids"]), len(ids))
