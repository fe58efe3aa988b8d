"""The figures of curves: which metrics stand together, and in which order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gspo_moe.report.collect import Arm
from gspo_moe.report.outcomes import ACCURACY


@dataclass(frozen=True)
class Measure:
    """One panel of curves: a metric over steps.

    optional: its absence needs no mention. hopes_for_zero: a line of text stands in for curves that are 0 throughout.
    """

    metric: str
    title: str
    log: bool = False
    markers: bool = False
    optional: bool = False
    hopes_for_zero: bool = False


@dataclass(frozen=True)
class CurveFigure:
    key: str
    title: str
    caption: str
    measures: tuple[Measure, ...]
    optional: bool = False


LEARNING = (
    CurveFigure(
        "reward",
        "Reward and held-out accuracy",
        "Training reward of each step's rollouts; mean reward of the held-out answers, and the share of them that "
        "got 1 or more.",
        (
            Measure("reward/mean", "Training reward"),
            Measure("eval/reward", "Held-out reward", markers=True),
            Measure(ACCURACY, "Held-out accuracy", markers=True),
        ),
    ),
    CurveFigure(
        "supervised",
        "Supervised training",
        "",
        (Measure("sft/loss", "Training loss"), Measure("sft/token_accuracy", "Token accuracy")),
        optional=True,
    ),
)
SIGNAL = (
    CurveFigure(
        "signal",
        "What there is to learn from",
        "Groups whose answers all got the same reward teach nothing. Entropy of the next token falls where the policy "
        "grows sure. Rewards that failed or ran out of time count as task.reward.failure_reward.",
        (
            Measure("groups/degenerate", "Groups without a difference", hopes_for_zero=True),
            Measure("policy/entropy", "Entropy of the policy"),
            Measure("reward/failures", "Rewards that failed", hopes_for_zero=True),
            Measure("reward/timeouts", "Rewards out of time", hopes_for_zero=True),
            Measure("response/truncated", "Answers cut off", hopes_for_zero=True),
            Measure("reward/std", "Spread (std) of rewards", optional=True),
        ),
    ),
)
PARTS = CurveFigure(
    "reward_parts", "Parts of the reward", "Mean of each part that the rubric named.", (), optional=True
)
EVALUATION = CurveFigure("evaluation", "More of the held-out evaluation", "", (), optional=True)
OBJECTIVE = (
    CurveFigure(
        "clip_fraction",
        "Clip fraction of sequence and token ratios",
        "Share whose gradient the clip removes, on a log axis.",
        (
            Measure("clip_fraction/sequence", "Sequences clipped", log=True),
            Measure("clip_fraction/token", "Tokens clipped", log=True),
        ),
    ),
    CurveFigure(
        "ratio_spread",
        "Ratio spread, token against sequence",
        "Standard deviation of the ratio of policy to old policy, on a log axis.",
        (
            Measure("ratio/token_std", "Token ratio", log=True),
            Measure("ratio/sequence_std", "Sequence ratio", log=True),
        ),
    ),
)
LOAD = (
    CurveFigure(
        "load",
        "Expert load",
        "How unevenly tokens fall on experts in the training forward.",
        (
            Measure("routing/load/max_violation", "Busiest expert over the mean"),
            Measure("routing/load/cv", "Coefficient of variation"),
            Measure("routing/load/entropy", "Entropy of shares"),
        ),
    ),
)
REPLAY = (
    CurveFigure(
        "replay",
        "Routing Replay: what it did",
        "Of runs with routing.replay: tokens and layers that ran with replayed routes; expert slots where the router "
        "would have picked another expert; slots of mini-batch 1 that it picks itself, by the token's own row and by "
        "that of the token beside it, which a shift by one would bring up.",
        (
            Measure("routing/replay/coverage", "Coverage"),
            Measure("routing/replay/forced", "Slots forced", optional=True),
            Measure("routing/replay/aligned", "Aligned", optional=True),
            Measure("routing/replay/aligned_shifted", "Aligned one token off", optional=True),
            Measure("routing/replay/router_grad_norm", "Router gradient norm", optional=True),
        ),
        optional=True,
    ),
    CurveFigure(
        "predictor",
        "Predicted routes",
        "Of runs with routing.replay=predict: how far the router went from what was foretold, and from what it was in "
        "the old policy's pass. Predictors that know something keep the first below the second.",
        (
            Measure("routing/predictor/kl", "From what was foretold"),
            Measure("routing/predictor/kl_unchanged", "From what it was"),
            Measure("routing/predictor/changed", "Slots foretold otherwise"),
        ),
        optional=True,
    ),
)
MACHINE = (
    CurveFigure(
        "speed",
        "Throughput and memory",
        "All ranks together; memory of the main process.",
        (
            Measure("throughput/tokens_per_second", "Whole step"),
            Measure("rollout/tokens_per_second", "Generation"),
            Measure("memory/peak_rss_gib", "Peak resident memory"),
            Measure("memory/peak_device_gib", "Peak device memory", optional=True),
        ),
    ),
    CurveFigure(
        "health",
        "Length, divergence, gradient",
        "",
        (
            Measure("response/length_mean", "Response length"),
            Measure("kl/old_k3", "KL(old ‖ policy)"),
            Measure("mismatch/k3", "KL(rollout ‖ trainer)", optional=True),
            Measure("optimizer/grad_norm", "Gradient norm"),
        ),
    ),
    CurveFigure(
        "asynchrony",
        "Age of tokens, and who waits for whom",
        "Of runs with rollout.max_staleness: steps since a token was sampled, and seconds a step in which the trainer "
        "or the servers had nothing to do.",
        (
            Measure("lag/mean", "Lag"),
            Measure("timing/waiting_seconds", "Trainer waits"),
            Measure("queue/idle_seconds", "Servers wait"),
            Measure("queue/dropped", "Groups dropped", hopes_for_zero=True),
        ),
        optional=True,
    ),
)
ON_BANK = "Every arm took N off-policy mini-batches on the same frozen rollouts, so what differs is the objective."
BANK = (
    CurveFigure(
        "bank_objective",
        "Bank: clip fractions over N mini-batches",
        ON_BANK,
        (
            Measure("clip_fraction/sequence", "Sequences clipped", log=True),
            Measure("clip_fraction/token", "Tokens clipped", log=True),
        ),
    ),
    CurveFigure(
        "bank_ratios",
        "Bank: ratio spread over N mini-batches",
        ON_BANK,
        (
            Measure("ratio/token_std", "Token ratio", log=True),
            Measure("ratio/sequence_std", "Sequence ratio", log=True),
        ),
    ),
    CurveFigure(
        "bank_routing",
        "Bank: routing over N mini-batches",
        ON_BANK,
        (
            Measure("routing/staleness/slot_change", "Expert slots changed"),
            Measure("kl/old_k3", "KL(old ‖ policy)"),
            Measure("routing/attribution/phi_token", "φ of tokens"),
            Measure("routing/attribution/phi_sequence", "φ of sequences"),
            Measure("routing/attribution/washout", "Washout W"),
            Measure("eval/reward", "Held-out reward after it"),
            Measure(ACCURACY, "Held-out accuracy after it"),
        ),
    ),
)


def named_parts(arms: Sequence[Arm]) -> CurveFigure:
    """A panel for every part of the reward that a run has."""
    return _every(PARTS, arms, r"reward/parts/(.+)", markers=False)


def more_of_evaluation(arms: Sequence[Arm]) -> CurveFigure:
    """A panel for every held-out figure that no other has: length, cut off answers, pass@k."""
    return _every(EVALUATION, arms, r"eval/(?!reward$|accuracy$)(.+)", markers=True)


def _every(kind: CurveFigure, arms: Sequence[Arm], pattern: str, *, markers: bool) -> CurveFigure:
    measures = []
    for name in sorted({name for arm in arms for name in arm.names}):
        match = re.fullmatch(pattern, name)
        if match:
            title = match[1][:1].upper() + match[1][1:].replace("_", " ") if markers else match[1]
            measures.append(Measure(name, title, markers=markers, hopes_for_zero=markers))
    return replace(kind, measures=tuple(measures))
