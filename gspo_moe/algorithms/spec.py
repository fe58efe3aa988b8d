"""What the program asks of an algorithm: one frozen record a policy loss. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from gspo_moe.errors import ConfigError
from gspo_moe.section import Section

if TYPE_CHECKING:
    from gspo_moe.algorithms.ratios import LossInputs, Objective

WIDE_CLIP = 0.01


@dataclass(frozen=True)
class Algorithm:
    """A policy loss: what it maximises, and what follows for configuration, recording and training.

    name: as messages print it.
    objective: what the loss sees of a pack to J_i; the loss is -1/N sum_i J_i.
    clips: the paper's own `clip_low` and `clip_high`; None where nothing is clipped by them.
    ratio: what is clipped, and with it which clips make sense.
    terms: `sequence` for one term a sequence, without weights a token.
    average: what all counts the same: sequences, tokens of the mini-batch, or tokens over the length limit (`fixed`);
        with `sum` tokens of a sequence add up and sequences are averaged. A KL penalty is averaged alike.
    advantages: of a group of answers to one prompt, with or without the division by their rewards' deviation, or by GAE
        from a value function, one a token; `options` is then a `ValueOptions`.
    token_advantages: group advantages may also be given one a token.
    unbounded_below: `clip_low` may be 1, which is no lower bound.
    dual_clip: it is made of `ratios.clip`, whose lower branch `algorithm.dual_clip` may bound.
    whole_ratio: its weight is no linear function of the ratio against the engine, so that weights of
        `algorithm.mismatch` cannot stand beside it.
    router_shift: it needs gamma of SPEC section 4, for which routes and scores are recorded.
    instead: for where that cannot be had: `algorithm.name=..., which ...`.
    dynamic_sampling: replaces groups of equal rewards unless the config says otherwise.
    overlong_share: the over-long buffer is that part of the length limit, one in so many tokens; 0 for none.
    fused: `kernels.sequence_reduce` computes it, with advantages a sequence or a token.
    options: its own keys, under `algorithm.options`; every one needs a default.
    """

    name: str
    objective: Callable[[LossInputs], Objective]
    clips: tuple[float, float] | None
    ratio: Literal["sequence", "token"] = "token"
    terms: Literal["sequence", "token"] = "token"
    average: Literal["sequence", "token", "fixed", "sum"] = "sequence"
    advantages: Literal["group", "group_unscaled", "gae"] = "group"
    token_advantages: bool = False
    unbounded_below: bool = False
    dual_clip: bool = False
    whole_ratio: bool = False
    router_shift: bool = False
    instead: str = ""
    dynamic_sampling: bool = False
    overlong_share: int = 0
    fused: Literal["sequence", "token"] | None = None
    options: type[Section] | None = None

    def __post_init__(self) -> None:
        fields = {} if self.options is None else self.options.model_fields
        required = [name for name, field in fields.items() if field.is_required()]
        if required:
            raise ConfigError(f"option {required[0]} of {self.name} has no default; give it one")
        if self.has_value_function and (self.options is None or not issubclass(self.options, ValueOptions)):
            raise ConfigError(
                f"advantages=gae of {self.name} needs a ValueOptions for its options; derive them from it"
            )

    @property
    def has_value_function(self) -> bool:
        return self.advantages == "gae"


class ValueOptions(Section):
    """The options of a value function: advantages by GAE(gamma, lam), and a loss with `value_coeff`.

    value_clip: how far a value may leave the old one before its gradient ends; null for any distance.
    """

    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    value_coeff: PositiveFloat = 0.5
    value_clip: PositiveFloat | None = 0.2


def clip_fault(spec: Algorithm, low: float, high: float, allow_wide: bool, prefix: str = "") -> str | None:
    """What is wrong with these clips for that loss, with the fix, or None; `prefix` stands before each key."""
    if spec.clips is None:
        return None
    values = f"{prefix}clip_low={low:g} with {prefix}clip_high={high:g}"
    default_low, default_high = spec.clips
    if not (low >= 0 and high >= 0):
        return f"{values}: both must be 0 or more"
    paper = f"the default is {default_low:.3g} and {default_high:.3g}"
    if spec.ratio == "sequence":
        if max(low, high) >= WIDE_CLIP and not allow_wide:
            return (
                f"{values} switches clipping off for the sequence ratio of {spec.name} (the default is {default_low:g} "
                f"and {default_high:g}); lower both below {WIDE_CLIP:g} or set {prefix}allow_wide_clip=true"
            )
        return None
    if max(low, high) < WIDE_CLIP:
        return (
            f"{values} is made for a sequence ratio and clips nearly every token ratio of {spec.name}; raise one of "
            f"them to {WIDE_CLIP:g} or more, or leave both out ({paper})"
        )
    if low > 1.0 or (low == 1.0 and not spec.unbounded_below):
        allowed = "at most 1, which is no lower bound" if spec.unbounded_below else "below 1"
        return f"{values}: the lower bound 1 - clip_low is of a ratio; set {prefix}clip_low {allowed} ({paper})"
    return None
