"""Conversations for tests."""

from gspo_moe.types import Conversation, Turn


def answered(text: str) -> Conversation:
    """A policy's one answer."""
    return (Turn("policy", text),)
