"""Prompts longer than a run has room for: how long each is, and what stands in for one that is generated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gspo_moe.config.schema import Config
from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import ConfigError, RolloutError
from gspo_moe.types import Prompt, Prompts

# In place of a generated prompt comes the one so many places further on, which no run gets to.
STRIDE = 1 << 40
MOST_REDRAWN = 100
AT_ONCE = 4096


@dataclass(frozen=True)
class Limit:
    """tokens: of a prompt at most. words: what sets it."""

    tokens: int
    words: str


def prompt_limit(config: Config, max_positions: int, split: str = "train") -> Limit:
    """`rollout.max_prompt_tokens`, else what an answer of the split leaves of the model's positions and a micro-batch.

    Raises ConfigError where no prompt has room, or a prompt of `rollout.max_prompt_tokens` has not.
    """
    (answer, key), wanted = config.answer_limit(split), config.rollout.max_prompt_tokens
    whole, name = min(
        (config.schedule.micro_batch_tokens, f"schedule.micro_batch_tokens={config.schedule.micro_batch_tokens}"),
        (max_positions, f"the model's {max_positions} positions"),
    )
    if wanted is not None and wanted + answer > whole:
        raise ConfigError(
            f"rollout.max_prompt_tokens={wanted} and {key}={answer} together exceed {name}; "
            "lower one of the two" + ("" if whole == max_positions else ", or raise schedule.micro_batch_tokens")
        )
    if wanted is not None:
        return Limit(wanted, f"rollout.max_prompt_tokens={wanted}")
    if answer >= whole:
        raise ConfigError(f"{key}={answer} leaves no room for a prompt in {name}; lower it")
    return Limit(whole - answer, f"the {whole - answer} tokens that {key}={answer} leaves of {name}")


def lengths(renderer: Renderer, prompts: Sequence[Prompt], limit: int) -> Iterator[int]:
    """Tokens of each prompt, or an upper bound of them where that is within `limit` already.

    No token stands for less than a character of ASCII, which no normalisation makes longer.
    """

    def length(prompt: Prompt) -> int:
        text = renderer.text(prompt)
        return len(text) if text.isascii() and len(text) < limit else len(renderer.prompt(prompt))

    # Tokenizers of Hugging Face leave Python's lock to others while they encode.
    threads = max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(length, prompts, chunksize=64)


def too_long(
    prompts: Prompts, split: str, size: int, measure: Callable[[Sequence[Prompt]], Iterator[int]], limit: int
) -> dict[int, int]:
    """Tokens of the split's prompts that are longer, by their numbers."""
    found = dict[int, int]()
    for start in range(0, size, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, size))
        batch = [prompts.prompt(split, number) for number in numbers]
        found |= {number: tokens for number, tokens in zip(numbers, measure(batch), strict=True) if tokens > limit}
    return found


class KeptPrompts:
    """Another task's prompts that end, without some of a split's."""

    def __init__(self, prompts: Prompts, split: str, indices: Sequence[int]) -> None:
        self._prompts, self._split, self._indices = prompts, split, indices

    def prompt(self, split: str, index: int) -> Prompt:
        return self._prompts.prompt(split, self._indices[index] if split == self._split else index)

    def size(self, split: str) -> int | None:
        return len(self._indices) if split == self._split else self._prompts.size(split)


class ShortPrompts:
    """Another task's prompts, which in `splits` never end: in place of a longer one comes one from far behind.

    drops: whether one may; else the run ends there. Raises RolloutError where it may not, or none is short enough.
    """

    def __init__(self, prompts: Prompts, splits: Sequence[str], renderer: Renderer, limit: Limit, drops: bool) -> None:
        self._prompts, self._splits, self._renderer = prompts, splits, renderer
        self._limit, self._drops = limit, drops

    def prompt(self, split: str, index: int) -> Prompt:
        if split not in self._splits:
            return self._prompts.prompt(split, index)
        tokens = 0
        for draw in range(MOST_REDRAWN if self._drops else 1):
            prompt = self._prompts.prompt(split, index + draw * STRIDE)
            (tokens,) = lengths(self._renderer, [prompt], self._limit.tokens)
            if tokens <= self._limit.tokens:
                return prompt
        if self._drops:
            raise RolloutError(
                f"{MOST_REDRAWN} prompts in a row of split {split!r} are longer than {self._limit.words}, the last has "
                f"{tokens} tokens; raise the limit, or widen task.options"
            )
        raise RolloutError(
            f"prompt {split}/{index} has {tokens} tokens, more than {self._limit.words}; raise the limit, or set "
            "rollout.long_prompts to drop or truncate_left"
        )

    def size(self, split: str) -> int | None:
        return self._prompts.size(split)
