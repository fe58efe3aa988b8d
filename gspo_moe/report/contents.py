"""Which figures a report has, and what it says where a metric was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gspo_moe.report.collect import Arm, Collection
from gspo_moe.report.figures import Figure, LinePanel
from gspo_moe.report.outcomes import attribution_figure, bank_figure, outcome_figure
from gspo_moe.report.routing import PAIRS, expert_maps, load_maps, volatility_figure, volatility_maps
from gspo_moe.report.series import bank_curve, each_arm, lacking, step_curve, unit_of


@dataclass(frozen=True)
class Measure:
    """One panel of curves: a metric over steps. optional: its absence needs no mention."""

    metric: str
    title: str
    log: bool = False
    markers: bool = False
    optional: bool = False


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
        "Training reward of each step's rollouts, and the share of held-out answers with full reward.",
        (Measure("reward/mean", "Training reward"), Measure("eval/accuracy", "Held-out accuracy", markers=True)),
    ),
    CurveFigure(
        "supervised",
        "Supervised training",
        "",
        (Measure("sft/loss", "Training loss"), Measure("sft/token_accuracy", "Token accuracy")),
        optional=True,
    ),
)
OBJECTIVE = (
    CurveFigure(
        "clip_fraction",
        "Clip fraction of sequence and token ratios",
        "Share whose gradient the clip removes, on a log axis; a step without any has no place on it.",
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
            Measure("eval/accuracy", "Held-out accuracy after it"),
        ),
    ),
)


@dataclass(frozen=True)
class Contents:
    """absent: figures for which no run has a value, with the metrics they would need."""

    figures: tuple[Figure, ...]
    absent: tuple[str, ...]


def contents(collection: Collection) -> Contents:
    """Every figure that the runs have values for, in the order of the page."""
    arms = collection.online
    absent: list[str] = []
    figures = [
        *(_curves(kind, arms, absent) for kind in LEARNING),
        outcome_figure(arms, collection.baseline),
        *(_curves(kind, arms, absent) for kind in OBJECTIVE),
        volatility_figure(arms, absent),
        *(volatility_maps(arms, pair, absent) for pair in PAIRS),
        attribution_figure(arms, absent),
        *(_curves(kind, arms, absent) for kind in LOAD),
        load_maps(arms),
        expert_maps(arms),
        *(_curves(kind, arms, absent) for kind in MACHINE),
    ]
    bank = [*_bank(collection.bank), bank_figure(collection.bank, collection.baseline)]
    drawn = tuple(figure for figure in [*(figures if arms else ()), *bank] if figure is not None)
    return Contents(drawn, tuple(absent) if arms else ())


def _curves(kind: CurveFigure, arms: Sequence[Arm], absent: list[str]) -> Figure | None:
    panels, notes, empty = [], [], []
    for measure in kind.measures:
        metric, unit = measure.metric, unit_of(measure.metric)
        curves = each_arm(arms, partial(step_curve, metric=metric, smooth=not measure.markers, log=measure.log))
        if curves:
            panels.append(LinePanel(measure.title, unit, curves, log=measure.log, markers=measure.markers))
        if not measure.optional:
            notes += lacking(arms, metric) if curves else []
            empty += [] if curves else [metric]
    if not panels:
        absent += [] if kind.optional else [f"{kind.title}: {', '.join(empty)}"]
        return None
    notes += [f"{metric}: no run has a value to draw" for metric in empty]
    shared = all(panel.log for panel in panels)
    return Figure(kind.key, kind.title, kind.caption, tuple(panels), tuple(notes), shared_y=shared)


def _bank(arms: Sequence[Arm]) -> list[Figure | None]:
    """Figures over the number of mini-batches N, for what took its updates on one frozen bank of rollouts."""
    return [_bank_figure(kind, arms) for kind in BANK]


def _bank_figure(kind: CurveFigure, arms: Sequence[Arm]) -> Figure | None:
    panels = []
    for measure in kind.measures:
        final = measure.metric.startswith("eval/")
        curves = bank_curve(arms, measure.metric, final=final, log=measure.log)
        if curves:
            panels.append(
                LinePanel(
                    measure.title,
                    unit_of(measure.metric),
                    curves,
                    x_label="N",
                    log=measure.log,
                    markers=True,
                    doublings=True,
                )
            )
    shared = all(panel.log for panel in panels)
    return Figure(kind.key, kind.title, kind.caption, tuple(panels), shared_y=shared) if panels else None
