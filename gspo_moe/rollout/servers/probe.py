"""After each sync: does every server hold the weights that were sent? Its log-probs of a few tokens say so.

Servers answer 200 and hold wrong weights: vLLM's own reload does on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_moe.errors import RolloutError
from gspo_moe.rollout.engine import SamplingParams
from gspo_moe.rollout.servers.labels import policy_version
from gspo_moe.rollout.servers.records import Answer, Ask, Dialect, Servers
from gspo_moe.rollout.servers.syncing import on_main

PROMPT_TOKENS, SAMPLED_TOKENS = 32, 16
# Of the mean difference in nats a token: vLLM in fp32 differs from a trainer in fp32 by 1e-6; bf16 by guess, untried.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1}

Score = Callable[[Any, tuple[int, ...]], list[float]]


@dataclass(frozen=True)
class Probe:
    """Asks every server for an answer to the same prompt and has the trainer score what it sampled.

    score: of a model and token ids, each token's log-prob after the first (nats, temperature 1), on every rank;
    collective. tolerance: of the mean absolute difference, nats a token.
    """

    servers: Servers
    dialect: Dialect
    prompt_ids: tuple[int, ...]
    score: Score
    tolerance: float

    def check(self, model: Any, version: int) -> float:
        """The largest difference of all servers. Collective.

        Raises RolloutError, with both log-probs, where one is beyond the tolerance or a server answers badly.
        """
        ask = probe_ask(self.prompt_ids, policy_version(version))

        def answers() -> list[Answer]:
            return [self.dialect.answer(ask, body) for body in self.servers.everywhere(self.dialect.ask(ask))]

        largest = 0.0
        scores: dict[tuple[int, ...], list[float]] = {}
        for number, answer in enumerate(on_main(answers)):
            if not answer.token_ids:
                raise RolloutError(f"server {number} gave the probe 0 tokens ({answer.finish}); restart it")
            if answer.version != version:
                raise RolloutError(
                    f"server {number} answers with weights of version {answer.version}, and was sent {version}; "
                    "restart it"
                )
            if answer.token_ids not in scores:
                scored = self.score(model, self.prompt_ids + answer.token_ids)
                scores[answer.token_ids] = scored[-len(answer.token_ids) :]
            largest = max(largest, self._difference(number, answer, scores[answer.token_ids], policy_version(version)))
        return largest

    def _difference(self, number: int, answer: Answer, expected: Sequence[float], version: int) -> float:
        differences = [abs(a - b) for a, b in zip(answer.log_probs, expected, strict=True)]
        mean = sum(differences) / len(differences)
        if not mean <= self.tolerance:
            raise RolloutError(
                f"server {number} does not hold the weights of version {version} that it was sent: over "
                f"{len(differences)} tokens of the probe its log-probs are {_shown(answer.log_probs)}, the trainer's "
                f"{_shown(expected)}, {mean:.3g} apart in the mean where {self.tolerance:g} is allowed; give the "
                "servers the model's own architecture and dtype, and restart them"
            )
        return mean


def probe_ids(vocab_size: int) -> tuple[int, ...]:
    """A fixed prompt that has tokens of the whole vocabulary."""
    return tuple((7919 * (position + 1)) % vocab_size for position in range(PROMPT_TOKENS))


def probe_ask(prompt_ids: tuple[int, ...], version: int) -> Ask:
    params = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_response_tokens=SAMPLED_TOKENS,
        stop_ids=frozenset(),
        seed="probe",
    )
    return Ask(f"probe-{version}", 0, prompt_ids, SAMPLED_TOKENS, params)


def _shown(log_probs: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.4f}" for value in log_probs[:4])
    return f"{shown}{', ...' if len(log_probs) > 4 else ''}"
