"""What any rollout engine offers to training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError
from gspo_moe.rollout.stop_strings import StopStrings
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
    stop_ids, stop_strings: an answer ends at such a token, and at the token with which its text holds such a string.
    """

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_ids: frozenset[int]
    seed: str
    report_routes: bool = False
    stop_strings: StopStrings | None = None


Ended = Callable[[int, Rollout], None]  # told of a request, by its number, and a sample of it


class RolloutEngine(Protocol):
    """Samples, and says of each token which policy version sampled it."""

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, ended: Ended | None = None
    ) -> list[list[Rollout]]:
        """For each request its samples, in order. Collective: every rank calls it, each with its own requests.

        ended: may be told of samples that end while others go on.
        """
        ...

    def room(self, params: SamplingParams) -> int:
        """The longest prompt, in tokens, that leaves room for an answer."""
        ...


class WeightSink(Protocol):
    """Takes the weights that the next rollouts are to come from."""

    def publish(self, model: Any, version: int) -> Mapping[str, float]:
        """Metrics of it. model: a `model.build.Model`. version: optimizer steps that its weights have taken.

        Collective.
        """
        ...


def make_stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> frozenset[int]:
    """The tokenizer's end tokens, and the token of each stop string that is one. Raises ConfigError for an empty one.

    `make_stop_strings` finds those which are made of other tokens.
    """
    if "" in stop:
        raise ConfigError("rollout.stop: '' is in every answer; leave it out")
    encoded = [tokenizer.encode(text) for text in stop]
    return frozenset((*tokenizer.eos_ids, *(ids[0] for ids in encoded if len(ids) == 1)))
