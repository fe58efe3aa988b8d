"""What stage sft learns, against transformers in float64 with labels found in the text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gspo_moe.config.schema import Config
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import HFTokenizer
from gspo_moe.errors import DataError
from gspo_moe.model.weights import SafetensorsSource
from gspo_moe.training.sft import training_sample
from gspo_moe.types import Message, Prompt
from tests.chatml import SIZES, chatml_model
from tests.policy import packs_of, trained
from tests.qwen3 import layout, reference_model
from tests.steps import train_supervised

ASKED = (Message("system", "Be brief."), Message("user", "2+2?"))
TALK = (Message("assistant", "4"), Message("user", "and 3?"), Message("assistant", "It is seven."))
SAID: tuple[tuple[Prompt, str | tuple[Message, ...]], ...] = (
    (Prompt("sft/0", "", "own", messages=ASKED), TALK),
    (Prompt("sft/1", "6*7?", "own"), (Message("assistant", "Forty-two"),)),
    (Prompt("sft/2", "", "own", messages=ASKED), "Four."),
)
SEPARATE = re.compile(r"<\|im_\w+\|>|.", re.DOTALL)  # the tokens of ASCII text
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatml_model(tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def renderer(folder: Path) -> Renderer:
    return Renderer(HFTokenizer(folder))


def conversation(prompt: Prompt, said: str | tuple[Message, ...]) -> str:
    """The text of prompt and demonstration to the last end token, made without the program."""
    messages = prompt.messages or (Message("user", prompt.text),)
    messages += (Message("assistant", said),) if isinstance(said, str) else said
    return "\n".join(f"<|im_start|>{one.role}\n{one.content}<|im_end|>" for one in messages)


def test_the_loss_is_that_of_the_answers_and_their_end_tokens_alone(renderer: Renderer, folder: Path) -> None:
    samples = [training_sample(renderer, prompt, said) for prompt, said in SAID]
    reference = reference_model(SIZES).double()
    reference.set_experts_implementation("eager")
    total, count, expected = 0.0, 0, []
    for prompt, said in SAID:
        text = conversation(prompt, said)
        tokens = list(SEPARATE.finditer(text))
        spans = [found.span(1) for found in ANSWER.finditer(text)]
        ids = torch.tensor([renderer.tokenizer.encode(one[0]) for one in tokens])[:, 0]
        mask = torch.tensor([any(a <= one.start() < b for a, b in spans) for one in tokens])
        expected.append((tuple(ids.tolist()), tuple(mask.int().tolist())))
        with torch.no_grad():
            logits = reference(input_ids=ids[None]).logits[0, :-1]
        labels = torch.where(mask[1:], ids[1:], -100)
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int(mask.sum())
    for sample, (its_ids, its_mask) in zip(samples, expected, strict=True):
        length = len(its_ids)
        assert (sample.token_ids[:length], sample.response_mask[:length]) == (its_ids, its_mask)
        assert not any(sample.response_mask[length:])  # what a template puts behind the last end token
    assert count == len("4It is seven.Forty-twoFour.") + 4
    with trained(Config(), layout(), SIZES, SafetensorsSource(folder)) as (model, optimizer):
        statistics, _ = train_supervised(model, optimizer, packs_of(samples, per_pack=2), count)
    assert statistics.to_metrics()["sft/loss"] == pytest.approx(total / count, abs=1e-5)


def test_a_demonstration_of_no_use_names_its_prompt(renderer: Renderer) -> None:
    prompt = Prompt("sft/7", "2+2?", "own")
    with pytest.raises(DataError, match="demonstration of prompt sft/7 has no word of an assistant"):
        training_sample(renderer, prompt, (Message("user", "four"),))
    both = Prompt("sft/8", "2+2?", "own", messages=ASKED)
    with pytest.raises(DataError, match="prompt sft/8 has both text and messages"):
        training_sample(renderer, both, "4")
