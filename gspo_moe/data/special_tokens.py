"""Special tokens in rendered text: a template's are tokens, while the same words in what somebody says stay text.

Before a template runs, a mark goes into each special word of the contents, so that what is special behind it is the
template's own. Marks are Unicode's noncharacters, which no interchanged text has; one that a text has is not taken.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from gspo_moe.errors import DataError

if TYPE_CHECKING:
    import tokenizers

NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Piece(NamedTuple):
    """A token and the characters that it stands for, text[start:end]."""

    id: int
    start: int
    end: int


def unused_marks(texts: Iterable[str], count: int) -> list[str]:
    """Characters that none of the texts has. Raises DataError where they have nearly every noncharacter."""
    used = set().union(*texts)
    found = [mark for mark in NONCHARACTERS if mark not in used]
    if len(found) < count:
        raise DataError("a prompt has nearly all of Unicode's noncharacters U+FDD0 to U+FDEF; clean it")
    return found[:count]


class SpecialTokens:
    """Those of a tokenizer of the `tokenizers` library. ids: of them all. named: some by name, such as "eos_token"."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, named: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._literal: tokenizers.Tokenizer | None = None
        self._making = Lock()
        self.named = named
        added = {key: token for key, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.ids = frozenset(added)
        # The longest word counts where one begins with another; some take the space beside them along.
        tokens = sorted(added.values(), key=lambda token: -len(token.content))
        self._words = "|".join(re.escape(token.content) for token in tokens)
        blank = r"\s*"
        self._matches = "|".join(
            blank * token.lstrip + re.escape(token.content) + blank * token.rstrip for token in tokens
        )

    def guard(self, value: Any, mark: str) -> Any:
        """The text with a mark in each special word; of mappings and lists, all texts in them."""
        if isinstance(value, Mapping):
            return {key: self.guard(one, mark) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(one, mark) for one in value]
        if not isinstance(value, str) or not self._words:
            return value
        before = None
        while before != value:  # a word may have another one in it
            before, value = value, re.sub(f"(?<!{mark})(?:{self._words})", lambda found: _inside(found[0], mark), value)
        return value

    def pieces(self, text: str, mark: str) -> list[Piece]:
        """Tokens of rendered text; spans are those of the text without its marks.

        Special words are tokens where they have no mark. Without any mark the ids are those of `Tokenizer.encode`.
        """
        runs: list[tuple[str, bool]] = []
        for part in re.split(f"(?<!{mark})({self._matches})", text) if mark in text else [text]:
            if runs and mark not in part and not runs[-1][1]:
                runs[-1] = (runs[-1][0] + part, False)
            else:
                runs.append((part.replace(mark, ""), mark in part))
        found, start = list[Piece](), 0
        for run, as_text in runs:
            found += [Piece(piece.id, piece.start + start, piece.end + start) for piece in self._encode(run, as_text)]
            start += len(run)
        return found

    def _of_text(self) -> tokenizers.Tokenizer:
        """A copy that takes no word for special; it is the tokenizer's setting, and prompts are measured in threads."""
        with self._making:
            if self._literal is None:
                literal = copy.deepcopy(self._tokenizer)
                literal.encode_special_tokens = True
                self._literal = literal
        return self._literal

    def _encode(self, text: str, as_text: bool) -> list[Piece]:
        encoding = (self._of_text() if as_text else self._tokenizer).encode(text, add_special_tokens=False)
        return [Piece(one, *span) for one, span in zip(encoding.ids, encoding.offsets, strict=True)]


def _inside(word: str, mark: str) -> str:
    return word[0] + mark + word[1:] if len(word) > 1 else mark + word
