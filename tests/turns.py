"""Conversations for tests."""

from gspo_moe.types import Conversation, Message, Turn


def answered(text: str | tuple[Message, ...]) -> Conversation:
    """A policy's one answer."""
    assert isinstance(text, str)
    return (Turn("policy", text),)
