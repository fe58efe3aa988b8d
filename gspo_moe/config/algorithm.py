"""The section `algorithm`: policy loss, sampling of groups, corrections, KL to a reference. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gspo_moe.algorithms.spec import Algorithm, clip_fault
from gspo_moe.algorithms.table import find_algorithm
from gspo_moe.config.validation import validated
from gspo_moe.section import Section


class MismatchConfig(Section):
    """Weights against sampling from an engine whose log-probs are not the trainer's; see docs/algorithms.md."""

    correction: Literal["none", "tis", "mask", "geo_mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    low: NonNegativeFloat | None = None
    high: PositiveFloat | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = {"tis": (0.0, 2.0), "geo_mask": (0.999, 1.002)}.get(self.correction, (0.5, 5.0))
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    @model_validator(mode="after")
    def _bounds_fit(self) -> MismatchConfig:
        low, high = self.bounds
        given = f"algorithm.mismatch.low={low:g} with algorithm.mismatch.high={high:g}"
        if self.correction == "none":
            if self.low is not None or self.high is not None:
                raise ValueError(f"{given} bounds nothing; set algorithm.mismatch.correction to tis or mask")
        elif self.correction == "tis" and self.low is not None:
            raise ValueError("algorithm.mismatch.low is for masks, tis has no lower bound; leave it out")
        elif self.correction == "geo_mask" and self.level == "sequence":
            raise ValueError(
                "algorithm.mismatch.correction=geo_mask judges sequences and weighs tokens; leave "
                "algorithm.mismatch.level out, or take correction=mask"
            )
        elif not low < 1.0 < high:
            raise ValueError(f"{given} cuts tokens on which engine and trainer agree; set low below 1 and high above 1")
        elif self.level == "sequence" and self.high is None:
            raise ValueError(
                "algorithm.mismatch.level=sequence weighs by the mean of a response, which hardly leaves 1, so that no "
                "default fits; set algorithm.mismatch.high a little above mismatch/sequence_ratio_max of a sound run, "
                "such as 1.01, and for correction=mask algorithm.mismatch.low as far below 1"
            )
        return self


class KLConfig(Section):
    """A penalty of `coeff` times the KL to a frozen reference: the run's first weights, or those in `reference`."""

    coeff: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3"
    reference: str | None = None

    @model_validator(mode="after")
    def _penalizes(self) -> KLConfig:
        if self.reference is not None and not self.coeff:
            raise ValueError(
                f"algorithm.kl.reference={self.reference} with algorithm.kl.coeff=0 does nothing; raise coeff, or "
                "leave the reference out"
            )
        return self


class AlgorithmConfig(Section):
    """The policy loss, by its name or `my_module:MySpec`; see docs/algorithms.md. Clips default to its paper's own.

    options: its own keys, where it has any.
    dual_clip: the ratio above which a term of negative advantage has no gradient, for losses that are made of min and
    clip; null for none. off_policy_mask: how far the policy may have left, in nats a token, what it has sampled with
    negative advantage; null for any distance.
    dynamic_sampling: groups of equal rewards are replaced by new prompts, in at most `sampling_rounds` batches of them.
    overlong_buffer: the last tokens before the length limit, over which a response loses up to a reward of 1; 0 for
    none. Both are on where the algorithm has them unless they are set.
    """

    name: str = "gspo"
    options: dict[str, Any] = Field(default_factory=dict)
    clip_low: NonNegativeFloat | None = None
    clip_high: NonNegativeFloat | None = None
    allow_wide_clip: bool = False
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    off_policy_mask: PositiveFloat | None = None
    old_log_probs: Literal["trainer", "rollout"] = "trainer"
    mini_batches: PositiveInt = 4
    dynamic_sampling: bool | None = None
    sampling_rounds: PositiveInt = 10
    overlong_buffer: NonNegativeInt | None = None
    mismatch: MismatchConfig = MismatchConfig()
    kl: KLConfig = KLConfig()

    @property
    def spec(self) -> Algorithm:
        return find_algorithm(self.name)

    @cached_property
    def settings(self) -> Any:
        """The options as an instance of the algorithm's own class; None where it has none."""
        return None if self.spec.options is None else self.spec.options.model_validate(self.options)

    @property
    def samples_dynamically(self) -> bool:
        return self.spec.dynamic_sampling if self.dynamic_sampling is None else self.dynamic_sampling

    def overlong_tokens(self, max_response_tokens: int) -> int:
        """The over-long buffer under this length limit; 0 without one."""
        if self.overlong_buffer is not None:
            return self.overlong_buffer
        return -(-max_response_tokens // self.spec.overlong_share) if self.spec.overlong_share else 0

    @property
    def clips(self) -> tuple[float, float]:
        """`clip_low` and `clip_high`; infinite for an algorithm that clips nothing by them."""
        low, high = self.spec.clips or (math.inf, math.inf)
        return (low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high)

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        find_algorithm(value)
        return value

    @field_validator("options")
    @classmethod
    def _options_are_the_algorithms(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """With their defaults written out, so that a run's file holds what it was trained with."""
        name = info.data.get("name")
        if name is None:
            return value
        options = find_algorithm(name).options
        if options is not None:
            return validated(options, value, prefix="algorithm.options.").model_dump(mode="json")
        if value:
            raise ValueError(f"algorithm.name={name} has no options; leave algorithm.options out")
        return value

    def faults(self) -> Iterator[str]:
        yield from self._clip_faults()
        yield from self._correction_faults()
        yield from self._old_policy_faults()

    def _clip_faults(self) -> Iterator[str]:
        if self.spec.clips is None and (self.clip_low is not None or self.clip_high is not None):
            yield (
                f"algorithm.name={self.name} clips nothing by algorithm.clip_low and algorithm.clip_high; "
                "leave both out"
            )
        fault = clip_fault(self.spec, *self.clips, self.allow_wide_clip, prefix="algorithm.")
        if fault:
            yield fault
        if self.dual_clip is not None and not self.spec.dual_clip:
            yield (
                f"algorithm.dual_clip={self.dual_clip:g} bounds losses made of min and clip, which algorithm.name="
                f"{self.name} is not; leave it out"
            )

    def _correction_faults(self) -> Iterator[str]:
        correction, level = self.mismatch.correction, self.mismatch.level
        if correction != "none" and self.old_log_probs == "rollout":
            yield (
                f"algorithm.mismatch.correction={correction} with algorithm.old_log_probs=rollout would count the "
                "engine's log-probs twice: ratios against them are the correction; set one of them to its default"
            )
        if correction != "none" and self.spec.whole_ratio:
            yield (
                f"algorithm.mismatch.correction={correction} multiplies the advantages, and algorithm.name={self.name} "
                "weighs by a function of the whole ratio, the engine's part included; leave it out and set "
                "algorithm.old_log_probs=rollout"
            )
        if correction != "none" and level == "token" and self.spec.terms == "sequence":
            yield (
                f"algorithm.name={self.name} has one term a sequence and no place for token weights; "
                + ("take correction=mask and " if correction == "geo_mask" else "")
                + "set algorithm.mismatch.level=sequence"
            )

    def _old_policy_faults(self) -> Iterator[str]:
        if self.spec.router_shift and self.old_log_probs == "rollout":
            yield (
                f"algorithm.name={self.name} weighs tokens by how far the router's scores moved since the old policy's "
                "forward pass, which algorithm.old_log_probs=rollout leaves out; set it to trainer"
                + (f" or use {self.spec.instead}" if self.spec.instead else "")
            )
        if self.spec.has_value_function and self.old_log_probs == "rollout":
            yield (
                f"algorithm.name={self.name} takes the old policy's values in its forward pass, which "
                "algorithm.old_log_probs=rollout leaves out; set it to trainer"
            )
        if self.spec.has_value_function and self.dynamic_sampling:
            yield (
                "algorithm.dynamic_sampling=true replaces groups of equal rewards, in which algorithm.name="
                f"{self.name}, that compares with its value function, has as much to learn; leave it out"
            )
