"""The command `gspo-moe generate`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.garbage import imports

if TYPE_CHECKING:
    from gspo_moe.config.schema import Config
    from gspo_moe.types import Prompt

LIMIT = 512  # of an answer's tokens where no config says more


def add_generate(commands: Any) -> None:
    """Adds it to argparse's subparsers."""
    command = commands.add_parser("generate", help="answers to one prompt, for a look at a model")
    command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, unless there is --model")
    command.add_argument("--model", metavar="HF_DIR", help="folder with config.json, *.safetensors and a tokenizer")
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="- reads standard input")
    asked.add_argument("--messages", metavar="FILE", help='JSON: [{"role": "user", "content": "..."}, ...]')
    command.add_argument("--samples", type=int, default=1, metavar="N", help="answers (default: 1)")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. evaluation.temperature=0")
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    with imports():
        from gspo_moe.evaluation.generate import generate, shown
        from gspo_moe.parallel.groups import shut_down

    if options.samples < 1:
        raise ConfigError(f"--samples {options.samples} gives no answer; set it to 1 or more")
    config = _config(options.config, options.model, options.overrides)
    asked = config.evaluation.max_response_tokens or "max_response_tokens" in config.rollout.model_fields_set
    limit = None if asked or options.model is None else LIMIT
    answered = generate(config, _prompt(options.prompt, options.messages), options.samples, limit)
    shut_down()
    if int(os.environ.get("RANK", "0")) == 0:
        print(*shown(answered), sep="\n")


def _config(path: str | None, model: str | None, overrides: Sequence[str]) -> Config:
    from gspo_moe.config.loading import load_config

    if model is None:
        if path is None:
            raise ConfigError("say which model: give CONFIG, or --model HF_DIR")
        return load_config(path, overrides)
    if path is not None and "=" not in path:
        raise ConfigError(f"{path} and --model {model} are both given; leave one out, or override model.hf={model}")
    first = [] if path is None else [path]
    return load_config(None, ["model.preset=null", f"model.hf={model}", *first, *overrides])


def _prompt(text: str | None, file: str | None) -> Prompt:
    from gspo_moe.plain_json import check_characters, read_json
    from gspo_moe.tasks.messages import read_messages, read_tools
    from gspo_moe.types import Prompt

    if file is None:
        assert text is not None, "argparse asks for one of them"
        return Prompt("generate/0", sys.stdin.read() if text == "-" else text, "generate")
    try:
        values = read_json(Path(file))
        check_characters(values)
    except ValueError as error:
        raise DataError(f"--messages {file} cannot be read as JSON ({error}); give a list of messages") from None
    record = values if isinstance(values, dict) else {"messages": values}
    messages = read_messages(record.get("messages"), f"--messages {file}: messages")
    tools = read_tools(record.get("tools"), f"--messages {file}: tools")
    return Prompt("generate/0", "", "generate", messages=messages, tools=tools)
