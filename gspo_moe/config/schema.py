"""Every configuration key, typed, frozen and checked when built. Torch-free.

`Config` is the whole of one run. Cross-section rules stand in `Config`; what fits which machine stands in `layout`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.architecture import PRESETS, Architecture, architecture_from_hf
from gspo_moe.config.routing import RoutingConfig
from gspo_moe.config.validation import validated
from gspo_moe.section import Section

Probability = Annotated[float, Field(gt=0.0, le=1.0)]
HOTTEST = 1000.0  # temperatures beyond it only flatten float32's last digits


class ModelConfig(Section):
    """Which model. `preset` names sizes; `hf` is a folder with config.json and, unless `random_init`, weights.

    checkpoint: a folder of megatron-core's with config.json, written by `gspo-moe convert` or by a run (its
    `checkpoints/step_*`); only the weights are read.
    backend: whose layers; `auto` takes Transformer Engine's where it can run, else megatron-core's own (`local`).
    fused_log_probs: log-probs from hidden states, with at most `log_prob_memory_mib` MiB of logits at a time; false
    has the output layer make all logits of a micro-batch.
    deterministic: on GPUs a repeated step gives equal bits; false lets attention's backward and small sums add in any
    order.
    """

    preset: str | None = None
    hf: str | None = None
    checkpoint: str | None = None
    random_init: bool = False
    overrides: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["fp32", "bf16"] = "fp32"
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    fused_log_probs: bool = True
    log_prob_memory_mib: PositiveInt = 512
    deterministic: bool = True

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}; known are {', '.join(PRESETS)}, or set model.hf to a folder")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        sources = {"model.preset": self.preset, "model.hf": self.hf, "model.checkpoint": self.checkpoint}
        given = {key: source for key, source in sources.items() if source is not None}
        if len(given) != 1:
            named = " and ".join(f"{key}={source!r}" for key, source in (given or sources).items())
            raise ValueError(f"{named}: set one of them and leave the other null")
        if self.random_init and self.checkpoint is not None:
            raise ValueError("model.random_init=true leaves model.checkpoint unread; name its folder in model.hf")
        if self.preset is not None:
            self.architecture(vocab_size=1)
        return self

    @property
    def folder(self) -> str | None:
        """The folder of `hf` or `checkpoint`."""
        return self.hf if self.hf is not None else self.checkpoint

    def architecture(self, vocab_size: int | None = None) -> Architecture:
        """Sizes of the model; `vocab_size` fills in where the preset leaves it to the tokenizer.

        Raises ConfigError for a folder whose config.json cannot be read and for overrides that do not fit.
        """
        if self.folder is not None:
            values = architecture_from_hf(self.folder).model_dump()
        else:
            assert self.preset is not None
            values = {"vocab_size": vocab_size, **PRESETS[self.preset]}
        return validated(Architecture, {**values, **self.overrides}, prefix="model.overrides.")


class TokenizerConfig(Section):
    """`sentencepiece` trains on the task's own text when `path` is unset; `hf` reads `tokenizer.json` in `path`.

    Without `kind`, the model's HF folder decides.
    """

    kind: Literal["auto", "sentencepiece", "hf"] = "auto"
    path: str | None = None
    vocab_size: PositiveInt = 512


class ParallelConfig(Section):
    """How many ranks share what; data parallelism is what is left of the world."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    expert: PositiveInt = 1
    expert_tensor: PositiveInt | None = None
    context: PositiveInt = 1
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    distributed_optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    timeout_minutes: PositiveFloat = 10.0

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallelism inside an expert; megatron-core's default is that of the dense layers."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor


class RolloutConfig(Section):
    """Sampling: `prompts_per_step` prompts over all ranks, `samples_per_prompt` answers each.

    samples_per_prompt: at least 2, unless the algorithm compares answers with a value function.
    stop: strings of one token each, which end an answer as the model's own end tokens do.
    bank: a file of `gspo-moe bank`, whose frozen answers the steps take instead of making their own.
    cuda_graph: `auto` replays decode steps as CUDA graphs on GPUs, and says why where it cannot; `off` never does.
    """

    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 8
    temperature: Annotated[float, Field(gt=0.0, le=HOTTEST)] = 1.0
    top_p: Probability = 1.0
    top_k: NonNegativeInt = 0
    max_response_tokens: PositiveInt = 32
    stop: tuple[str, ...] = ()
    max_batch: PositiveInt = 512
    cuda_graph: Literal["auto", "off"] = "auto"
    bank: str | None = None


class RewardConfig(Section):
    """Rewards run in worker processes; one that raises, hangs or exceeds 1e6 is counted and gets `failure_reward`.

    allow_all_failed: goes on also where no answer of a step or an evaluation got a reward of its own.
    """

    workers: PositiveInt = 1
    timeout_seconds: PositiveFloat = 10.0
    failure_reward: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    allow_all_failed: bool = False


class TaskConfig(Section):
    name: str = "sort_letters"
    options: dict[str, Any] = Field(default_factory=dict)
    reward: RewardConfig = RewardConfig()


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then constant, cosine or linear decay to `min_lr`.

    max_skipped_updates: in a row, after which the run ends; an update is skipped where its gradient is not finite.
    """

    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 1e-4
    min_lr: NonNegativeFloat = 0.0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    warmup_updates: NonNegativeInt = 0
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    clip_grad: NonNegativeFloat = 1.0
    max_skipped_updates: PositiveInt = 10

    @model_validator(mode="after")
    def _decays(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr:g} exceeds optimizer.lr={self.lr:g}; lower it to that")
        return self


class ScheduleConfig(Section):
    """`steps` RL steps (or supervised batches); a micro-batch packs up to `micro_batch_tokens` tokens."""

    steps: PositiveInt = 100
    micro_batch_tokens: PositiveInt = 4096
    sft_batch: PositiveInt = 64


class EvaluationConfig(Section):
    """Held-out accuracy: `samples` answers to each of `prompts` prompts, before, after, and every `interval` steps."""

    prompts: NonNegativeInt = 512
    samples: PositiveInt = 1
    interval: NonNegativeInt = 0
    temperature: Annotated[float, Field(ge=0.0, le=HOTTEST)] = 1.0


class CheckpointConfig(Section):
    """`interval` steps between checkpoints, 0 for only the last; `keep` newest complete ones stay."""

    interval: NonNegativeInt = 0
    keep: PositiveInt = 2
    export_hf: bool = True


class WandbConfig(Section):
    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class LoggingConfig(Section):
    run_dir: str = "runs/default"
    samples_per_step: NonNegativeInt = 4
    wandb: WandbConfig | None = None
    progress: bool = True


class Config(Section):
    """The whole of one run."""

    seed: NonNegativeInt = 1
    stage: Literal["rl", "sft"] = "rl"
    model: ModelConfig = ModelConfig(preset="tiny")
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = RolloutConfig()
    task: TaskConfig = TaskConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    routing: RoutingConfig = RoutingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _preset_name_alone(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _mini_batches_divide(self) -> Config:
        if self.stage == "rl" and self.rollout.prompts_per_step % self.algorithm.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step={self.rollout.prompts_per_step} is not a multiple of "
                f"algorithm.mini_batches={self.algorithm.mini_batches}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _staleness_has_old_routes(self) -> Config:
        if self.stage == "rl" and self.routing.record and self.algorithm.old_log_probs == "rollout":
            raise ValueError(
                "algorithm.old_log_probs=rollout leaves out the forward pass whose routes staleness is measured "
                "against; set routing.record=false, or algorithm.old_log_probs=trainer"
            )
        return self

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> Config:
        spec = self.algorithm.spec
        if self.stage == "rl" and not spec.has_value_function and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}: algorithm.name={self.algorithm.name} "
                "compares the answers to a prompt with each other; set it to 2 or more, or take an algorithm with a "
                "value function (docs/algorithms.md)"
            )
        return self

    @model_validator(mode="after")
    def _value_head_sees_hidden_states(self) -> Config:
        if self.has_value_head and not self.model.fused_log_probs:
            raise ValueError(
                f"algorithm.name={self.algorithm.name} has a value head on the hidden states that "
                "model.fused_log_probs=false does not hand on; set model.fused_log_probs=true"
            )
        return self

    @model_validator(mode="after")
    def _router_shift_is_recorded(self) -> Config:
        spec = self.algorithm.spec
        if self.stage == "rl" and spec.router_shift and not self.routing.record:
            raise ValueError(
                f"algorithm.name={self.algorithm.name} weighs tokens by how far the router's scores moved, which "
                "routing.record=false leaves unrecorded; set routing.record=true"
                + (f", or use {spec.instead}" if spec.instead else "")
            )
        return self

    @model_validator(mode="after")
    def _bank_has_each_prompt(self) -> Config:
        if self.stage == "rl" and self.algorithm.samples_dynamically and self.rollout.bank is not None:
            raise ValueError(
                f"rollout.bank={self.rollout.bank} has one batch of prompts a step, and algorithm.dynamic_sampling "
                "draws more; set algorithm.dynamic_sampling=false"
            )
        return self

    @model_validator(mode="after")
    def _answers_can_differ(self) -> Config:
        if self.stage == "rl" and self.algorithm.samples_dynamically and self.rollout.top_k == 1:
            raise ValueError(
                "algorithm.dynamic_sampling needs answers that differ, and rollout.top_k=1 gives every sample of a "
                "prompt the same one; set rollout.top_k=0 or algorithm.dynamic_sampling=false"
            )
        return self

    @model_validator(mode="after")
    def _overlong_buffer_fits(self) -> Config:
        limit = self.rollout.max_response_tokens
        if self.stage == "rl" and self.algorithm.overlong_tokens(limit) > limit:
            raise ValueError(
                f"algorithm.overlong_buffer={self.algorithm.overlong_buffer} exceeds rollout.max_response_tokens="
                f"{limit}; lower it to a fifth of that, or 0 for none"
            )
        return self

    @model_validator(mode="after")
    def _routing_fits(self) -> Config:
        routing = self.routing
        wanted = [
            name
            for name, is_set in (
                (f"routing.replay={routing.replay}", routing.replay != "none"),
                ("routing.engine_routes=true", routing.engine_routes),
                ("routing.probe_interval", routing.probe_interval > 0),
                ("routing.attribution=true", routing.attribution),
            )
            if is_set
        ]
        if wanted and self.stage == "sft":
            raise ValueError(f"{', '.join(wanted)}: stage=sft has no rollouts to measure; leave it to stage=rl")
        if routing.attribution and self.algorithm.mini_batches < 2:
            raise ValueError(
                "routing.attribution=true with algorithm.mini_batches=1: log-ratios are 0 before the first update, so "
                "there is nothing to split; set algorithm.mini_batches to 2 or more"
            )
        return self

    @property
    def has_value_head(self) -> bool:
        return self.stage == "rl" and self.algorithm.spec.has_value_function

    @property
    def run_path(self) -> Path:
        return Path(self.logging.run_dir)
