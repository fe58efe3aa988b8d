"""Which tokens of a rendered conversation an assistant says, found in the one rendering that its ids are of.

Where the template has no `{% generation %}` blocks, a mark inside of a message's content, in a place where the template
reads the same without it, shows where the message went. Before it the template's head of an answer ends, as it also
stands before an answer to come; behind it the answer's end token is the first special one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from gspo_moe.data.special_tokens import Piece
from gspo_moe.errors import DataError
from gspo_moe.types import Message


class Render(Protocol):
    """head: ends with the head of the next answer. generation_marks: around each `{% generation %}` block."""

    def __call__(
        self, messages: Sequence[Message], head: bool, generation_marks: tuple[str, str] = ("", "")
    ) -> str: ...


@dataclass(frozen=True)
class AnswerMask:
    """mark: of special words, which rendered text has and the pieces' spans do not count.

    spare: two characters that no message has.
    """

    render: Render
    messages: Sequence[Message]
    mark: str
    spare: tuple[str, str]

    @cached_property
    def text(self) -> str:
        return self.render(self.messages, False)

    def of_blocks(self, pieces: Sequence[Piece], ends: Collection[int]) -> tuple[int, ...]:
        """One a token: 1 in the template's own blocks, and on an end token that follows one.

        ends: ids that end an answer. Raises DataError where the template changes what a block gave.
        """
        before, behind = self.spare
        rendered = self.render(self.messages, False, self.spare)
        if rendered.replace(before, "").replace(behind, "") != self.text:
            raise DataError("the chat template changes what a {% generation %} block gave; take the filter off it")
        found, start, at = [0] * len(pieces), 0, 0
        for part in re.split(f"([{before}{behind}])", rendered):
            if part == before:
                start = at
            elif part == behind:
                said = [n for n, piece in enumerate(pieces) if piece.end > start and piece.start < at]
                follows = [n + 1 for n in said[-1:] if n + 1 < len(pieces) and pieces[n].id not in ends]
                for n in (*said, *(n for n in follows if pieces[n].id in ends)):
                    found[n] = 1
            else:
                at += self._length(part)
        return tuple(found)

    def of_messages(self, pieces: Sequence[Piece], ends: Collection[int]) -> tuple[int, ...]:
        """One a token: 1 behind the head of each assistant's message up to its end token, which is one of `ends`.

        Raises DataError where a message cannot be found again, no head of an answer stands before it or no end token
        behind it.
        """
        places = [self._place(number) for number in range(len(self.messages))]
        found = [0] * len(pieces)
        for number, message in enumerate(self.messages):
            place = places[number]
            if message.role != "assistant" or place is None:
                continue
            earlier = max((one for one in places[:number] if one is not None), default=0)
            later = min((one for one in places[number + 1 :] if one is not None), default=len(self.text))
            start, inside, limit = map(self._unmarked, (self._start(number, earlier, place), place, later))
            last = next((n for n, one in enumerate(pieces) if one.id in ends and inside <= one.start < limit), None)
            if last is None:
                raise DataError(
                    f"message {number + 1}: the chat template puts no end token behind an assistant's message, so that "
                    "nobody could learn to end one; let it write {{ eos_token }} there"
                )
            for n in range(last + 1):
                found[n] |= pieces[n].end > start
        return tuple(map(int, found))

    def _place(self, number: int) -> int | None:
        """Where in `text` a character of the message stands; None where the template leaves the message out."""
        mark, content = self.spare[0], self.messages[number].content
        for at in _inner(content):
            marked = self._with_content(number, content[:at] + mark + content[at:])
            if marked.replace(mark, "") == self.text:
                if marked.count(mark) > 1:
                    raise DataError(f"message {number + 1}: the chat template says it twice; correct the template")
                return marked.find(mark) if mark in marked else None
        raise DataError(
            f"message {number + 1}: the chat template changes what it says, so that it cannot be told from the "
            "template's own words; put {% generation %} blocks into the template"
        )

    def _start(self, number: int, earlier: int, place: int) -> int:
        """Where the head before an assistant's message ends, which begins behind `earlier`."""
        head = self._head
        at = self.text.find(head, earlier, place) if head else -1
        if at >= 0:
            return at + len(head)
        # An answer of the past may have another head than one to come: what an empty one stands behind.
        before, found, _ = self._with_content(number, self.spare[0]).partition(self.spare[0])
        if found and before[:earlier] == self.text[:earlier] and self.text.startswith(before):
            return len(before)
        raise DataError(
            f"message {number + 1}: the chat template puts another head before it than before an answer to come, so "
            "that it cannot be told where it begins; set chat.thinking as these messages have it, or put "
            "{% generation %} blocks into the template"
        )

    @cached_property
    def _head(self) -> str:
        """Of an answer to come."""
        first = next(number for number, message in enumerate(self.messages) if message.role == "assistant")
        asked = self.messages[:first]
        without, whole = self.render(asked, False), self.render(asked, True)
        return whole.removeprefix(without) if whole.startswith(without) else ""

    def _with_content(self, number: int, content: str) -> str:
        changed = replace(self.messages[number], content=content)
        return self.render([*self.messages[:number], changed, *self.messages[number + 1 :]], False)

    def _length(self, text: str) -> int:
        return len(text) - text.count(self.mark)

    def _unmarked(self, at: int) -> int:
        return self._length(self.text[:at])


def _inner(content: str) -> list[int]:
    """Places in a text, best first: before its last character, behind its first, in the middle, none at blank ends."""
    first, end = len(content) - len(content.lstrip()), len(content.rstrip())
    return list(dict.fromkeys((end - 1, first + 1, (first + end) // 2))) if first < end else [len(content)]
