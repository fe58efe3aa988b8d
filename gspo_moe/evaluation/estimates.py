"""Held-out figures of prompts that were answered several times, with intervals: pure maths.

An interval is over prompts, which are what is drawn: the answers to one prompt are no independent trials of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from gspo_moe.observability.comparison import LEVEL, Estimate, estimate
from gspo_moe.types import RolloutGroup

CORRECT = 1.0


def correct_answers(group: RolloutGroup) -> int:
    """How many answers to the prompt have a reward of 1 or more."""
    return sum(reward >= CORRECT for reward in group.rewards)


def pass_at(k: int, samples: int, correct: int) -> float:
    """The chance that one of k answers, drawn from `samples` without putting back, is among the `correct` ones.

    Unbiased for a new draw of k from the model (arXiv 2107.03374, equation 1); k is at most `samples`.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_at_name(k: int) -> str:
    return f"eval/pass_at/{k}"


def estimates(groups: Sequence[RolloutGroup], ks: Sequence[int]) -> dict[str, Estimate]:
    """`eval/accuracy` (avg@k), `eval/reward` and each `eval/pass_at/{k}`: mean over prompts, and its interval.

    The interval is the 95 % percentile bootstrap over prompts with a fixed seed, NaN of a single prompt.
    """
    counts = [(len(group.rollouts), correct_answers(group)) for group in groups]
    values = {
        "eval/accuracy": [correct / samples for samples, correct in counts],
        "eval/reward": [sum(group.rewards) / len(group.rollouts) for group in groups],
        **{pass_at_name(k): [pass_at(k, *count) for count in counts] for k in ks},
    }
    return {name: estimate(by_prompt) for name, by_prompt in values.items()}


def summary(groups: Sequence[RolloutGroup], metrics: Mapping[str, float], ks: Sequence[int]) -> Iterator[str]:
    """A line `NAME VALUE` for each metric, behind it `[LOW, HIGH]` where there is an interval, else why not."""
    found = estimates(groups, ks)
    flat = []
    for name, value in metrics.items():
        interval, one = "", found.get(name)
        if one is not None and one.low < one.high:
            interval = f" [{one.low:.6g}, {one.high:.6g}]"
        elif one is not None and len(groups) > 1:
            flat.append(name)
        yield f"{name} {value:.6g}{interval}"
    if len(groups) == 1:
        yield "one prompt: no interval, as it does not tell how others would go"
        return
    if flat:
        yield (
            f"{', '.join(flat)}: no interval, as all {len(groups)} prompts have the same value; a rate of up to "
            f"{1 - (1 - LEVEL) ** (1 / len(groups)):.1%} of other prompts could go unseen among so many"
        )
