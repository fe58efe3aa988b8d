"""The section `algorithm`: policy loss, sampling of groups, corrections, KL to a reference. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gspo_moe.config.clips import DEFAULT_CLIPS, WHOLE_SEQUENCES, clip_fault
from gspo_moe.config.section import Section


class MismatchConfig(Section):
    """Weights against sampling from an engine whose log-probs are not the trainer's; see docs/algorithms.md."""

    correction: Literal["none", "tis", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    low: NonNegativeFloat | None = None
    high: PositiveFloat | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = (0.0, 2.0) if self.correction == "tis" else (0.5, 5.0)
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    @model_validator(mode="after")
    def _bounds_fit(self) -> MismatchConfig:
        low, high = self.bounds
        given = f"algorithm.mismatch.low={low:g} with algorithm.mismatch.high={high:g}"
        if self.correction == "none":
            if self.low is not None or self.high is not None:
                raise ValueError(f"{given} bounds nothing; set algorithm.mismatch.correction to tis or mask")
        elif self.correction == "tis" and self.low is not None:
            raise ValueError("algorithm.mismatch.low is for correction=mask, tis has no lower bound; leave it out")
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

    coeff: NonNegativeFloat = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k3"
    reference: str | None = None

    @model_validator(mode="after")
    def _penalizes(self) -> KLConfig:
        if self.reference is not None and not self.coeff:
            raise ValueError(
                f"algorithm.kl.reference={self.reference} with algorithm.kl.coeff=0 does nothing; raise coeff, or "
                "leave the reference out"
            )
        return self


class PPOConfig(Section):
    """The value function of `ppo`: advantages by GAE(gamma, lam), and a loss with `value_coeff`.

    value_clip: how far a value may leave the old one before its gradient ends; null for any distance.
    """

    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    value_coeff: PositiveFloat = 0.5
    value_clip: PositiveFloat | None = 0.2


class AlgorithmConfig(Section):
    """The policy loss of SPEC section 1, or PPO's; clips default to each paper's own values.

    dynamic_sampling: groups of equal rewards are replaced by new prompts, in at most `sampling_rounds` batches of them.
    overlong_buffer: the last tokens before the length limit, over which a response loses up to a reward of 1.
    Both are on for `dapo` alone unless they are set; its buffer is a fifth of the limit. 0 switches the buffer off.
    """

    name: Literal["gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "cispo", "gmpo", "rspo", "ppo"] = "gspo"
    clip_low: NonNegativeFloat | None = None
    clip_high: NonNegativeFloat | None = None
    allow_wide_clip: bool = False
    old_log_probs: Literal["trainer", "rollout"] = "trainer"
    mini_batches: PositiveInt = 4
    dynamic_sampling: bool | None = None
    sampling_rounds: PositiveInt = 10
    overlong_buffer: NonNegativeInt | None = None
    mismatch: MismatchConfig = MismatchConfig()
    kl: KLConfig = KLConfig()
    ppo: PPOConfig = PPOConfig()

    @property
    def samples_dynamically(self) -> bool:
        return self.name == "dapo" if self.dynamic_sampling is None else self.dynamic_sampling

    def overlong_tokens(self, max_response_tokens: int) -> int:
        """The over-long buffer under this length limit; 0 without one."""
        if self.overlong_buffer is not None:
            return self.overlong_buffer
        return -(-max_response_tokens // 5) if self.name == "dapo" else 0

    @property
    def clips(self) -> tuple[float, float]:
        low, high = DEFAULT_CLIPS[self.name]
        return (low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high)

    @model_validator(mode="after")
    def _clips_fit(self) -> AlgorithmConfig:
        fault = clip_fault(self.name, *self.clips, self.allow_wide_clip, prefix="algorithm.")
        if fault:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _correction_fits(self) -> AlgorithmConfig:
        correction, level = self.mismatch.correction, self.mismatch.level
        if correction == "none":
            return self
        if self.old_log_probs == "rollout":
            raise ValueError(
                f"algorithm.mismatch.correction={correction} with algorithm.old_log_probs=rollout would count the "
                "engine's log-probs twice: ratios against them are the correction; set one of them to its default"
            )
        if level == "token" and self.name in WHOLE_SEQUENCES:
            raise ValueError(
                f"algorithm.name={self.name} has one term a sequence and no place for token weights; "
                "set algorithm.mismatch.level=sequence"
            )
        return self

    @model_validator(mode="after")
    def _router_shift_is_there(self) -> AlgorithmConfig:
        if self.name == "rspo" and self.old_log_probs == "rollout":
            raise ValueError(
                "algorithm.name=rspo weighs tokens by how far the router's scores moved since the old policy's forward "
                "pass, which algorithm.old_log_probs=rollout leaves out; set it to trainer or use algorithm.name=gmpo, "
                "which is rspo without that weight"
            )
        return self

    @model_validator(mode="after")
    def _value_function_is_used(self) -> AlgorithmConfig:
        if self.name != "ppo":
            if self.ppo != PPOConfig():
                raise ValueError(
                    f"algorithm.ppo belongs to algorithm.name=ppo, and name={self.name} has no value function; set "
                    "algorithm.name=ppo or leave algorithm.ppo out"
                )
            return self
        if self.old_log_probs == "rollout":
            raise ValueError(
                "algorithm.name=ppo takes the old policy's values in its forward pass, which algorithm.old_log_probs="
                "rollout leaves out; set it to trainer"
            )
        if self.dynamic_sampling:
            raise ValueError(
                "algorithm.dynamic_sampling=true replaces groups of equal rewards, in which algorithm.name=ppo, that "
                "compares with its value function, has as much to learn; leave it out"
            )
        return self
