"""The section `chat`: how prompts become what the model reads. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gspo_moe.section import Section


class ChatConfig(Section):
    """Prompts go through a chat template: text as a user's message.

    template: `auto` is the tokenizer's own where it has one, else text goes in as it is; `none` never uses one; else
    the path of a Jinja file.
    system: a system message before prompts that bring none. thinking: the template's `enable_thinking`; null leaves it
    to the template. variables: others of the template.
    special_tokens: whether words of prompts and environments that are special tokens stay `text` or become `tokens`.
    """

    template: str = "auto"
    system: str | None = None
    thinking: bool | None = None
    variables: dict[str, Any] = Field(default_factory=dict)
    special_tokens: Literal["text", "tokens"] = "text"
