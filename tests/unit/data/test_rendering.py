"""Prompts and turns as ids, against transformers' own rendering of the same template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gspo_moe.config.chat import ChatConfig
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import HFTokenizer, SentencePieceTokenizer
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.types import Conversation, Message, Prompt, Turn
from tests.turns import answered

END, START, BOS, PAD = range(4)
# ChatML as Qwen's, with what real templates use: special tokens by name, loop controls, tojson, generation blocks.
CHATML = """{{ bos_token }}{% if messages[0].role == 'system' and not messages[0].content %}
    {{ raise_exception('an empty system message') }}
{% endif %}
{% for message in messages %}
{% if message.role == 'tool' %}{% continue %}{% endif %}
{% generation %}<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endgeneration %}
{% if message.role == 'user' and '{' in message.content %}{{ {'é<': 1} | tojson }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SETTINGS = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": {"content": "<s>"}}
CHAT = Prompt("train/0", "", "chat", messages=(Message("system", "Be brief."), Message("user", "some text? {}")))
TEXT = Prompt("train/1", "some text", "text")


def tokenizer_folder(folder: Path, template: Any = None, file: str | None = None) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_end|>", "<|im_start|>", "<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to merge, some more text"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = SETTINGS if template is None else SETTINGS | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    return folder


@pytest.fixture
def chatml(tmp_path: Path) -> HFTokenizer:
    return HFTokenizer(tokenizer_folder(tmp_path, file=CHATML))


def reference(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )
    ids: list[int] = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def test_messages_become_the_ids_that_transformers_gives(chatml: HFTokenizer, tmp_path: Path) -> None:
    ids = Renderer(chatml).prompt(CHAT)
    assert ids == reference(tmp_path, [vars(message) for message in CHAT.messages])
    assert ids[:2] == [BOS, START]
    assert chatml.decode(ids).endswith('{"é<": 1}\n<|im_start|>assistant\n')


def test_what_an_environment_says_first_is_the_users_next_message(chatml: HFTokenizer, tmp_path: Path) -> None:
    messages = [*map(vars, CHAT.messages), {"role": "user", "content": "go"}]
    assert Renderer(chatml).prompt(CHAT, "go") == reference(tmp_path, messages)


@pytest.mark.parametrize("earlier", [(), (*answered("3"), Turn("environment", "more?"))])
def test_turns_continue_what_was_sampled_as_the_whole_conversation_reads(
    earlier: Conversation, chatml: HFTokenizer, tmp_path: Path
) -> None:
    ids = Renderer(chatml).prompt(CHAT)
    messages = [dict(vars(message)) for message in CHAT.messages]
    turns: Conversation = ()
    for turn in (*earlier, *answered("some text"), Turn("environment", "and then?")):
        if turn.role == "policy":
            ids += [*chatml.encode(turn.text), END]
        else:
            ids += Renderer(chatml).turn(CHAT, turns, turn.text, last_id=ids[-1])
        turns = (*turns, turn)
        messages.append({"role": "assistant" if turn.role == "policy" else "user", "content": turn.text})
    assert ids == reference(tmp_path, messages)


def test_an_answer_that_ended_otherwise_gets_the_templates_end(chatml: HFTokenizer) -> None:
    turns = answered("some text")
    stopped = Renderer(chatml).turn(CHAT, turns, "yes", last_id=END)
    assert Renderer(chatml).turn(CHAT, turns, "yes", last_id=chatml.encode("t")[0]) == [END, *stopped]


def test_text_is_encoded_as_it_is_and_needs_no_template(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(tokenizer_folder(tmp_path))
    assert Renderer(tokenizer).prompt(TEXT) == tokenizer.encode("some text")
    assert Renderer(tokenizer).prompt(TEXT, " more") == tokenizer.encode("some text more")
    taken = Renderer(tokenizer, ChatConfig(special_tokens="tokens"))
    assert taken.turn(TEXT, answered("?"), "<|im_end|>text", END) == [END, *tokenizer.encode("text")]


@pytest.mark.parametrize(
    "template", [CHATML, [{"name": "tools", "template": "-"}, {"name": "default", "template": CHATML}]]
)
def test_a_template_is_read_from_the_settings_where_it_has_no_file_of_its_own(template: Any, tmp_path: Path) -> None:
    ids = Renderer(HFTokenizer(tokenizer_folder(tmp_path, template))).prompt(CHAT)
    assert ids == reference(tmp_path, [vars(message) for message in CHAT.messages])
    own = HFTokenizer(tokenizer_folder(tmp_path, template, file="{{ messages[1].content }}"))
    assert own.decode(Renderer(own).prompt(CHAT)) == "some text? {}"


def test_messages_without_a_template_name_the_fix(tmp_path: Path) -> None:
    trained = SentencePieceTokenizer.train(["abc"], 300)
    for tokenizer in (HFTokenizer(tokenizer_folder(tmp_path)), trained):
        with pytest.raises(ConfigError, match=r"train/0 of task chat .*tokenizer\.path .*chat_template\.jinja"):
            Renderer(tokenizer).prompt(CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat template that cannot be read"),
        ("{{ raise_exception('no system') }}", r"refuses messages of system, user \(no system\)"),
        ("{{ messages.append(1) }}", r"refuses messages of system, user .*unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses messages of system, user"),
    ],
)
def test_templates_that_fail_say_where_they_stand(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = HFTokenizer(tokenizer_folder(tmp_path, file=template))
    with pytest.raises(DataError, match=message) as caught:
        Renderer(tokenizer).prompt(CHAT)
    assert "chat_template.jinja" in str(caught.value)


def test_what_no_conversation_can_come_of_is_refused(tmp_path: Path) -> None:
    both = Prompt("train/2", "text", "chat", messages=CHAT.messages)
    tokenizer = HFTokenizer(tokenizer_folder(tmp_path, file="{{ messages[1].content }}"))
    with pytest.raises(DataError, match="train/2 has both text and messages"):
        Renderer(tokenizer).prompt(both)
    with pytest.raises(DataError, match=r"train/0: .*leaves an assistant's answer out"):
        Renderer(tokenizer).turn(CHAT, answered("?"), "yes", END)
