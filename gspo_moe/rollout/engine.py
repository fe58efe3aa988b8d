"""What any rollout engine offers to training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError
from gspo_moe.types import Rollout


@dataclass(frozen=True)
class Request:
    """Tokens to go on from, `samples` times."""

    uid: str
    prompt_ids: tuple[int, ...]
    samples: int


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 keeps every token; `seed` with a request's uid fixes its samples.

    max_response_tokens: a request. report_routes: rollouts bring the experts that the engine picked.
    """

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_ids: frozenset[int]
    seed: str
    report_routes: bool = False


class RolloutEngine(Protocol):
    """Samples, and says of each token which policy version sampled it."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Rollout]]:
        """For each request its samples, in order. Collective: every rank calls it, each with its own requests."""
        ...

    def room(self, params: SamplingParams) -> int:
        """The longest prompt, in tokens, that leaves room for an answer."""
        ...


class WeightSink(Protocol):
    """Takes the weights that the next rollouts are to come from."""

    def publish(self, model: Any, version: int) -> None:
        """model: a `model.build.Model`. version: optimizer steps that its weights have taken. Collective."""


def make_stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> frozenset[int]:
    """The tokenizer's end tokens and each stop string's token. Raises ConfigError for a string of several tokens."""
    ids = set(tokenizer.eos_ids)
    for text in stop:
        encoded = tokenizer.encode(text)
        if len(encoded) != 1:
            raise ConfigError(f"rollout.stop: {text!r} is {len(encoded)} tokens; a stop string must be a single token")
        ids.add(encoded[0])
    return frozenset(ids)
