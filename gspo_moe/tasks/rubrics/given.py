"""What rewards are made from: a prompt's reference answers and row, and the policy's last answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.tasks.protocol import last_answer
from gspo_moe.types import Conversation, Prompt

END_OF_THINKING = "</think>"


def final_answer(turns: Conversation) -> str:
    """The policy's last turn, from behind its last </think> where it has one."""
    return last_answer(turns).rpartition(END_OF_THINKING)[2]


def reference_answers(prompt: Prompt) -> tuple[str, ...]:
    """The right answers, of which any will do: `reference["answer"]`, where that is a list each of its elements.

    Numbers are written out, 0.00001 and not 1e-05, which a mathematician reads as another one.

    Raises DataError where there is none, or one that is neither text nor a number.
    """
    answer = prompt.reference.get("answer")
    found = answer if isinstance(answer, list) else [answer]
    if answer is None or not found:
        raise DataError(f"{prompt.uid} has no answer to compare with; name its column in task.data.columns.answer")
    for one in found:
        if isinstance(one, bool) or not isinstance(one, str | int | float) or not _is_known(one):
            raise DataError(
                f"{prompt.uid} has the answer {one!r}, which is neither text nor a number; write it as text"
            )
    return tuple(f"{Decimal(repr(one)):f}" if isinstance(one, float) else str(one) for one in found)


def _is_known(value: str | float) -> bool:
    """Not what a table has in place of a number that is missing."""
    return isinstance(value, str) or math.isfinite(value)


def row_of(prompt: Prompt) -> Mapping[str, Any]:
    """The columns of the prompt's record; of a task that reads no records, all of its reference."""
    reference = prompt.reference
    return reference.get("row", {} if "source" in reference else reference)


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """A chat's prompt as plain values."""
    return [{"role": one.role, "content": one.content} for one in prompt.messages]


def completion_of(prompt: Prompt, turns: Conversation) -> list[dict[str, str]]:
    """What followed a chat's prompt, as messages."""
    other = "tool" if prompt.tools else "user"
    return [{"role": "assistant" if one.role == "policy" else other, "content": one.text} for one in turns]
