"""Prompts, and what an environment says between a policy's turns, as token ids.

Tokens that a policy sampled are never made again from their text: a conversation's ids only grow at their end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gspo_moe.config.chat import ChatConfig
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.types import Conversation, Message, Prompt

if TYPE_CHECKING:
    from gspo_moe.data.chat_template import ChatTemplate

ROLES = {"policy": "assistant", "environment": "user"}
# Stands for an answer while the template is asked what follows one: of the private use area, so in no real text.
MARK = "\ue0a7answer\ue0a7"


@dataclass(frozen=True)
class Rendered:
    """A whole conversation. answer_mask: one a token, 1 on what an assistant says and on the end token behind it."""

    token_ids: tuple[int, ...]
    answer_mask: tuple[int, ...]


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with the way in which a run's config has prompts read."""

    tokenizer: Tokenizer
    chat: ChatConfig = field(default_factory=ChatConfig)

    def prompt(self, prompt: Prompt, opening: str | None = None) -> list[int]:
        """Ids of all that the policy reads before its first answer.

        Text is encoded as it is, messages through the tokenizer's chat template, with the head of the answer behind
        them.
        opening: what the environment says at its reset, text behind the text or the user's message behind the messages.
        Raises ConfigError where messages meet a tokenizer without a template, DataError for text beside messages and
        messages that the template refuses.
        """
        if not prompt.messages:
            return self.tokenizer.encode(prompt.text + (opening or ""))
        if prompt.text:
            raise DataError(f"prompt {prompt.uid} has both text and messages; leave one of them empty")
        said = () if opening is None else (Message("user", opening),)
        return self.tokenizer.encode(self._template(prompt).render((*prompt.messages, *said)))

    def turn(self, prompt: Prompt, turns: Conversation, text: str, last_id: int) -> list[int]:
        """Ids that follow the policy's turn, the last of `turns`, whose last id is `last_id`: the environment's `text`.

        Behind a text prompt it is encoded as it is. Behind messages it is the user's, between what the chat template
        puts after an answer and the head of the next one; the template's own end of an answer is left out where
        `last_id` is one already. Raises as `prompt`.
        """
        if not prompt.messages:
            return self.tokenizer.encode(text)
        before = (Message(ROLES[turn.role], turn.text) for turn in turns[:-1])
        conversation = (*prompt.messages, *before, Message("assistant", MARK), Message("user", text))
        _, mark, rest = self._template(prompt).render(conversation).rpartition(MARK)
        if not mark:
            raise DataError(
                f"prompt {prompt.uid}: the tokenizer's chat template leaves an assistant's answer out, so that no turn "
                "can follow it; correct the template, or give the task's prompts as text"
            )
        ids, ends = self.tokenizer.encode(rest), self.tokenizer.eos_ids
        return ids[1:] if last_id in ends and ids[:1] and ids[0] in ends else ids

    def conversation(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Rendered:
        """Ids of a conversation that has been had, through the template, to the last answer's end token.

        Raises ConfigError where the tokenizer has no template, DataError for messages that it refuses.
        """
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "messages need a chat template and the tokenizer has none; set tokenizer.path to a folder with "
                "tokenizer.json and chat_template.jinja"
            )
        marked = [Message(one.role, MARK) if one.role == "assistant" else one for one in messages]
        answers = [one.content for one in messages if one.role == "assistant"]
        head, *rest = self.tokenizer.chat_template.render(marked).split(MARK)
        if len(rest) != len(answers):
            raise DataError("the tokenizer's chat template leaves an assistant's answer out; correct the template")
        ids = self.tokenizer.encode(head)
        mask = [0] * len(ids)
        for number, (answer, behind) in enumerate(zip(answers, rest, strict=True), start=1):
            said, after = self.tokenizer.encode(answer), self.tokenizer.encode(behind)
            end = next((i + 1 for i, one in enumerate(after) if one in self.tokenizer.eos_ids), 0)
            after = after[:end] if number == len(answers) else after
            ids += [*said, *after]
            mask += [1] * (len(said) + end) + [0] * (len(after) - end)
        return Rendered(tuple(ids), tuple(mask))

    def _template(self, prompt: Prompt) -> ChatTemplate:
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"prompt {prompt.uid} of task {prompt.task} consists of messages and the tokenizer has no chat "
                "template; set tokenizer.path to a folder with tokenizer.json and chat_template.jinja"
            )
        return self.tokenizer.chat_template
