"""`gspo-moe generate` through the command, greedy answers against transformers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gspo_moe.cli import main
from tests.chatml import END, SIZES, TEMPLATE, chatml_model
from tests.qwen3 import reference_model

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
HEAD = re.compile(r"answer (\d) of (\d): (\d+) tokens, finish (\w+), log-prob (\S+)\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatml_model(tmp_path_factory.mktemp("chatml"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[tuple[int, str, float, str]]]:
    """Tokens of the prompt; of each answer tokens, finish, log-prob and text."""
    assert main(["generate", *map(str, arguments)]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    _, *parts = HEAD.split(rest)
    answers = [parts[start : start + 6] for start in range(0, len(parts), 6)]
    assert [one[0] for one in answers] == [str(number + 1) for number in range(len(answers))]
    found = [(int(tokens), finish, float(total), text[:-1]) for _, _, tokens, finish, total, text in answers]
    return int(first.removeprefix("prompt: ").removesuffix(" tokens")), found


def test_greedy_answers_are_those_of_transformers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(MESSAGES))
    limit = 24
    greedy = ("evaluation.temperature=0", f"evaluation.max_response_tokens={limit}")
    count, answers = said(capsys, "--model", model, "--messages", file, "--samples", "2", *greedy)
    assert answers[0] == answers[1]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), eos_token=END, chat_template=TEMPLATE
    )
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert count == len(ids)
    reference, total, answer = reference_model(SIZES), 0.0, list[int]()
    while len(answer) < limit and END not in tokenizer.convert_ids_to_tokens(answer):
        with torch.no_grad():
            log_probs = reference(torch.tensor([[*ids, *answer]])).logits[0, -1].double().log_softmax(-1)
        answer.append(int(log_probs.argmax()))
        total += log_probs[answer[-1]].item()
    tokens, finish, log_prob, text = answers[0]
    assert (tokens, finish) == (len(answer), "stop" if answer[-1] == tokenizer.eos_token_id else "length")
    assert log_prob == pytest.approx(total, abs=1e-3)
    assert text == tokenizer.decode(answer).removesuffix(END)


def test_text_is_read_from_standard_input_with_a_config_and_overrides_behind(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{hf: {model}}}\nchat: {{template: none}}\nrollout: {{max_response_tokens: 250}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("6*7="))
    _, answers = said(capsys, config, "--prompt", "-", "--samples", "3", "seed=5", "evaluation.top_k=2")
    again = said(capsys, "--prompt", "6*7=", "--samples", "3", config, "evaluation.top_k=2", "seed=5")[1]
    assert answers == again
    assert len({text for *_, text in answers}) == 3
    # What the model has room for behind the prompt's tokens.
    assert all(tokens <= SIZES.max_positions - len("6*7=") for tokens, *_ in answers)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--prompt", "a"], "say which model: give CONFIG, or --model HF_DIR"),
        (["c.yaml", "--model", "m", "--prompt", "a"], "c.yaml and --model m are both given"),
        (["--model", "MODEL", "--prompt", ""], "the prompt has 0 tokens"),
        (["--model", "MODEL", "--prompt", "a" * 256], "the prompt has 2.. tokens; give .* fewer than the model's 256"),
        (["--model", "MODEL", "--prompt", "a", "--samples", "0"], "--samples 0 gives no answer"),
        (["--model", "MODEL", "--messages", "none.json"], "--messages none.json cannot be read as JSON"),
        (["--model", "MODEL", "--messages", "MODEL/config.json"], "messages is missing or null"),
    ],
)
def test_what_cannot_be_answered_says_so(
    arguments: list[str], fault: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if arguments[-1] != "" else ["chat.template=none"]
    assert main(["generate", *(one.replace("MODEL", str(model)) for one in arguments), *options]) == 2
    assert re.search(fault, capsys.readouterr().err)


def test_unknown_options_are_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "c.yaml", "--prompt", "a", "--smaples", "3"])
    assert "unrecognized arguments: --smaples" in capsys.readouterr().err
