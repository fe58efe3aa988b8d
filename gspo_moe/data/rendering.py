"""Prompts, conversations, and what an environment says between a policy's turns, as token ids.

Tokens that a policy sampled are never made again from their text: a conversation's ids only grow at their end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gspo_moe.config.chat import ChatConfig
from gspo_moe.data.special_tokens import unused_marks
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.types import Conversation, Message, Prompt

if TYPE_CHECKING:
    from gspo_moe.data.chat_template import ChatTemplate

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A whole conversation. answer_mask: one a token, 1 on what an assistant says and on the end token behind it."""

    token_ids: tuple[int, ...]
    answer_mask: tuple[int, ...]


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with the way in which a run's config has prompts read.

    max_prompt_tokens: longer prompts are cut off at their left end; None never cuts.
    """

    tokenizer: Tokenizer
    chat: ChatConfig = field(default_factory=ChatConfig)
    max_prompt_tokens: int | None = None

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template that prompts go through; None where text goes in as it is.

        Raises ConfigError for a file that is none, and for settings of `chat` that nothing reads.
        """
        from gspo_moe.data.chat_template import find_template  # text prompts do without Jinja2

        return find_template(self.chat, self.tokenizer)

    def prompt(self, prompt: Prompt, opening: str | None = None) -> list[int]:
        """Ids of all that the policy reads before its first answer.

        Messages go through the chat template, with the head of the answer behind them, and text as a user's message;
        without a template text is encoded as it is.
        opening: what the environment says at its reset, text behind the text or the user's message behind the messages.
        Raises ConfigError where messages meet a tokenizer without a template, DataError for text beside messages and
        messages that the template refuses.
        """
        ids = self._ids(*self._read(prompt, opening))
        return ids if self.max_prompt_tokens is None else ids[-self.max_prompt_tokens :]

    def text(self, prompt: Prompt) -> str:
        """What the policy reads before its first answer, for a person to read. Raises as `prompt`."""
        text, mark = self._read(prompt, None)
        return text.replace(mark, "")

    def end_of_answer(self, prompt: Prompt) -> int | None:
        """The special token that the template puts behind an answer; None without one. Raises as `prompt`."""
        asked, special = self._messages(prompt, None), self.tokenizer.special
        if asked is None or special is None or self.template is None:
            return None
        (answer,) = unused_marks((one.content for one in asked), 1)
        tools = list(prompt.tools)
        text = self.template.render([*asked, Message("assistant", answer)], tools, self._variables, head=False)
        first = self.tokenizer.encode(text.rpartition(answer)[2])[:1]
        return first[0] if first and first[0] in special.ids else None

    def answer(self, prompt: Prompt, text: str) -> list[int]:
        """Ids of an answer to learn: the text, and the end that the template, else the tokenizer, puts behind it."""
        end = self.end_of_answer(prompt)
        return [*self._text_ids(text), self.tokenizer.eos_id if end is None else end]

    def turn(self, prompt: Prompt, turns: Conversation, text: str, last_id: int) -> list[int]:
        """Ids that follow the policy's turn, the last of `turns`, whose last id is `last_id`: the environment's `text`.

        Without a template it is encoded as it is. With one it is the user's, or a tool's where the prompt has tools,
        between what the template puts after an answer and the head of the next one; the template's own end of an
        answer is left out where `last_id` is one already. Raises as `prompt`.
        """
        opening = turns[0].text if turns and turns[0].role == "environment" else None
        asked = self._messages(prompt, opening)
        if asked is None:
            return self._text_ids(text)
        said = "tool" if prompt.tools else "user"
        earlier = turns[:-1] if opening is None else turns[1:-1]
        before = [Message("assistant" if turn.role == "policy" else said, turn.text) for turn in earlier]
        answer, mark = unused_marks([text, *(one.content for one in (*asked, *before))], 2)
        guarded = [self._guarded(one, mark) for one in (*asked, *before, Message(said, text))]
        conversation = [*guarded[:-1], Message("assistant", answer), guarded[-1]]
        _, found, rest = self._rendered(conversation, self._guarded_tools(prompt.tools, mark)).rpartition(answer)
        if not found:
            raise DataError(
                f"prompt {prompt.uid}: the chat template leaves an assistant's answer out, so that no turn can follow "
                "it; correct the template, or set chat.template=none and give the task's prompts as text"
            )
        ids, ends = self._ids(rest, mark), self.tokenizer.eos_ids
        return ids[1:] if last_id in ends and ids[:1] and ids[0] in ends else ids

    def conversation(self, messages: Sequence[Message], tools: Tools = ()) -> Rendered:
        """A whole conversation as the chat template gives it, and which of its tokens are the assistant's.

        The mask is 1 from behind the head that the template gives an answer to the answer's end token. The template's
        `{% generation %}` blocks say so where it has them; the text is rendered once and never put together of parts.
        Raises ConfigError without a template, DataError for messages that it refuses, or of which it cannot be told
        what an assistant says.
        """
        from gspo_moe.data.answer_mask import AnswerMask

        template, special = self.template, self.tokenizer.special
        if template is None or special is None:
            raise ConfigError(
                "a conversation needs a tokenizer with a chat template and special tokens, and the run's has none; set "
                "tokenizer.path to a folder with tokenizer.json and chat_template.jinja"
            )
        asked = self._with_system(messages)
        mark, *spare = unused_marks((one.content for one in asked), 3)
        guarded, given = [self._guarded(one, mark) for one in asked], self._guarded_tools(tools, mark)

        def render(messages: Sequence[Message], head: bool, generation_marks: tuple[str, str] = ("", "")) -> str:
            return template.render(messages, given, self._variables, head, generation_marks)

        said = AnswerMask(render, guarded, mark, (spare[0], spare[1]))
        pieces, ends = special.pieces(said.text, mark), special.ids | set(self.tokenizer.eos_ids)
        mask = said.of_blocks(pieces, ends) if template.has_generation else said.of_messages(pieces, ends)
        return Rendered(tuple(piece.id for piece in pieces), mask)

    def _read(self, prompt: Prompt, opening: str | None) -> tuple[str, str]:
        """The rendered text, and the mark that special words of its contents have."""
        asked = self._messages(prompt, opening)
        if asked is None:
            text = prompt.text + (opening or "")
            (mark,) = unused_marks([text], 1)
            return self._guarded(Message("user", text), mark).content, mark
        (mark,) = unused_marks((one.content for one in asked), 1)
        guarded = [self._guarded(one, mark) for one in asked]
        return self._rendered(guarded, self._guarded_tools(prompt.tools, mark)), mark

    def _messages(self, prompt: Prompt, opening: str | None) -> tuple[Message, ...] | None:
        """What the template gets; None for text that is read as it is."""
        if prompt.messages and prompt.text:
            raise DataError(f"prompt {prompt.uid} has both text and messages; leave one of them empty")
        if self.template is None:
            if prompt.messages:
                fault = f"prompt {prompt.uid} of task {prompt.task} consists of messages"
                if self.chat.template == "none":
                    raise ConfigError(f"{fault}, which chat.template=none does not take; set it to auto or a file")
                raise ConfigError(
                    f"{fault} and the tokenizer has no chat template; set tokenizer.path to a folder with "
                    "tokenizer.json and chat_template.jinja, or chat.template to a Jinja file"
                )
            return None
        if prompt.tools and "tools" not in self.template.variables:
            raise ConfigError(
                f"prompt {prompt.uid} of task {prompt.task} offers tools, of which the chat template of "
                f"{self.template.file} says nothing; set chat.template to one that shows tools, or leave them out"
            )
        if not prompt.messages:
            return self._with_system([Message("user", prompt.text + (opening or ""))])
        return self._with_system([*prompt.messages, *([] if opening is None else [Message("user", opening)])])

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self.chat.system is None or (messages and messages[0].role == "system"):
            return tuple(messages)
        return (Message("system", self.chat.system), *messages)

    @property
    def _variables(self) -> dict[str, Any]:
        thinking = {} if self.chat.thinking is None else {"enable_thinking": self.chat.thinking}
        return {**self.chat.variables, **thinking}

    def _rendered(self, messages: Sequence[Message], tools: Tools) -> str:
        assert self.template is not None
        return self.template.render(messages, tools, self._variables)

    def _guarded(self, message: Message, mark: str) -> Message:
        special = self.tokenizer.special
        if special is None or self.chat.special_tokens == "tokens":
            return message
        return replace(message, content=special.guard(message.content, mark))

    def _guarded_tools(self, tools: Tools, mark: str) -> Tools:
        special = self.tokenizer.special
        return tools if special is None or self.chat.special_tokens == "tokens" else special.guard(list(tools), mark)

    def _ids(self, text: str, mark: str) -> list[int]:
        special = self.tokenizer.special
        if special is None or mark not in text:
            return self.tokenizer.encode(text)
        return [piece.id for piece in special.pieces(text, mark)]

    def _text_ids(self, text: str) -> list[int]:
        (mark,) = unused_marks([text], 1)
        return self._ids(self._guarded(Message("user", text), mark).content, mark)
