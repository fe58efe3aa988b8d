"""Which figures a report has, and what it says where a metric was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gspo_moe.report.collect import Arm, Collection
from gspo_moe.report.figures import Curve, Figure, LinePanel
from gspo_moe.report.measures import (
    BANK,
    LEARNING,
    LOAD,
    MACHINE,
    OBJECTIVE,
    REPLAY,
    SIGNAL,
    CurveFigure,
    Measure,
    more_of_evaluation,
    named_parts,
)
from gspo_moe.report.outcomes import (
    ACCURACY,
    NO_FULL_REWARD,
    attribution_figure,
    bank_figure,
    no_full_reward,
    outcome_figure,
)
from gspo_moe.report.routing import PAIRS, expert_maps, load_maps, volatility_figure, volatility_maps
from gspo_moe.report.series import are_zero, bank_curve, each_arm, lacking, step_curve, unit_of


@dataclass(frozen=True)
class Group:
    """Figures of one kind, by which the page's list of contents is ordered."""

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Contents:
    """absent: figures for which no run has a value, with the metrics they would need."""

    groups: tuple[Group, ...]
    absent: tuple[str, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(figure for group in self.groups for figure in group.figures)


def contents(collection: Collection) -> Contents:
    """Every figure that the runs have values for, in the order of the page."""
    arms = collection.online
    absent: list[str] = []
    groups = _online(arms, collection.baseline, absent) if arms else []
    bank = [_bank_figure(kind, collection.bank) for kind in BANK]
    groups.append(("Bank", [*bank, bank_figure(collection.bank, collection.baseline)]))
    drawn = [(title, tuple(figure for figure in figures if figure is not None)) for title, figures in groups]
    return Contents(tuple(Group(title, figures) for title, figures in drawn if figures), tuple(absent))


def _online(arms: Sequence[Arm], baseline: str, absent: list[str]) -> list[tuple[str, list[Figure | None]]]:
    def curves(*kinds: CurveFigure) -> list[Figure | None]:
        return [_curves(kind, arms, absent) for kind in kinds]

    return [
        ("Learning", [*curves(*LEARNING), outcome_figure(arms, baseline), *curves(more_of_evaluation(arms))]),
        ("Rewards", curves(named_parts(arms), *SIGNAL)),
        ("Objective", curves(*OBJECTIVE)),
        (
            "Routing",
            [
                volatility_figure(arms, absent),
                *(volatility_maps(arms, pair, absent) for pair in PAIRS),
                attribution_figure(arms, absent),
                *curves(*REPLAY, *LOAD),
                load_maps(arms),
                expert_maps(arms),
            ],
        ),
        ("Machine", curves(*MACHINE)),
    ]


def _curves(kind: CurveFigure, arms: Sequence[Arm], absent: list[str]) -> Figure | None:
    panels, notes, remarks, empty = [], [], [], []
    for measure in kind.measures:
        metric = measure.metric
        curves = each_arm(arms, partial(step_curve, metric=metric, smooth=not measure.markers))
        if (zero := _zero_words(measure, curves, arms)) is not None:
            remarks.append(zero)
        elif curves:
            unit = unit_of(metric)
            panels.append(LinePanel(measure.title, unit, curves, log=measure.log, markers=measure.markers))
        if not measure.optional:
            notes += lacking(arms, metric) if curves else []
            empty += [] if curves else [metric]
    if not (panels or remarks):
        absent += [f"{kind.title}: {', '.join(empty)}"] if empty and not kind.optional else []
        return None
    notes += [f"{metric}: no run has a value to draw" for metric in empty]
    return Figure(kind.key, kind.title, kind.caption, tuple(panels), tuple(notes), tuple(remarks), _shared(panels))


def _zero_words(measure: Measure, curves: Sequence[Curve], arms: Sequence[Arm]) -> str | None:
    """What is said in place of curves that are 0 throughout; None where they are drawn."""
    if not curves or not are_zero(curves):
        return None
    if measure.metric == ACCURACY:
        return NO_FULL_REWARD if no_full_reward(arms) else None
    return f"{measure.title}: 0 at every step." if measure.log or measure.hopes_for_zero else None


def _shared(panels: Sequence[LinePanel]) -> bool:
    return bool(panels) and all(panel.log for panel in panels)


def _bank_figure(kind: CurveFigure, arms: Sequence[Arm]) -> Figure | None:
    """Over the number of mini-batches N, for what took its updates on one frozen bank of rollouts."""
    panels, remarks = [], []
    for measure in kind.measures:
        curves = bank_curve(arms, measure.metric, final=measure.metric.startswith("eval/"))
        if (zero := _zero_words(measure, curves, arms)) is not None:
            remarks.append(zero)
        elif curves:
            unit, log = unit_of(measure.metric), measure.log
            panels.append(LinePanel(measure.title, unit, curves, x_label="N", log=log, markers=True, doublings=True))
    if not (panels or remarks):
        return None
    return Figure(kind.key, kind.title, kind.caption, tuple(panels), (), tuple(remarks), _shared(panels))
