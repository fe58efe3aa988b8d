"""What any rollout engine offers to training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError
from gspo_moe.types import Rollout


@dataclass(frozen=True)
class Request:
    """One prompt to answer `samples` times."""

    uid: str
    prompt_ids: tuple[int, ...]
    samples: int


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 keeps every token; `seed` with a request's uid fixes its samples.

    report_routes: rollouts bring the experts that the engine picked.
    """

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_ids: frozenset[int]
    seed: str
    report_routes: bool = False


class RolloutEngine(Protocol):
    def generate(self, requests: Sequence[Request], params: SamplingParams, policy_version: int) -> list[list[Rollout]]:
        """For each request its samples, in order. Collective: every rank calls it, each with its own requests."""
        ...


def make_stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> frozenset[int]:
    """The tokenizer's end tokens and each stop string's token. Raises ConfigError for a string of several tokens."""
    ids = set(tokenizer.eos_ids)
    for text in stop:
        encoded = tokenizer.encode(text)
        if len(encoded) != 1:
            raise ConfigError(f"rollout.stop: {text!r} is {len(encoded)} tokens; a stop string must be a single token")
        ids.add(encoded[0])
    return frozenset(ids)
