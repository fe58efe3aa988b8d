"""`Config`, the whole of one run: every key, typed, frozen and checked when built. Torch-free.

Each section is checked by itself; what two of them cannot be together stands in `rules`, what fits which machine in
`layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, field_validator

from gspo_moe.config import rules
from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.chat import ChatConfig
from gspo_moe.config.guard import GuardConfig
from gspo_moe.config.model import ModelConfig, TokenizerConfig
from gspo_moe.config.rollout import EvaluationConfig, RolloutConfig
from gspo_moe.config.routing import RoutingConfig
from gspo_moe.config.task import TaskConfig
from gspo_moe.config.training import CheckpointConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from gspo_moe.section import Section


class WandbConfig(Section):
    """Weights & Biases. mode: null is what the environment says (`WANDB_MODE`, `WANDB_DISABLED`), else online."""

    project: str
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


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
    chat: ChatConfig = ChatConfig()
    parallel: ParallelConfig = ParallelConfig()
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = RolloutConfig()
    task: TaskConfig = TaskConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    routing: RoutingConfig = RoutingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _preset_name_alone(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    def faults(self) -> Iterator[str]:
        yield from rules.faults(self)

    @property
    def has_value_head(self) -> bool:
        return self.stage == "rl" and self.algorithm.spec.has_value_function

    def answer_limit(self, split: str) -> tuple[int, str]:
        """Tokens of an answer of `split` at most, and the key that says so."""
        own = self.evaluation.max_response_tokens if split == "eval" else None
        if own is None:
            return self.rollout.max_response_tokens, "rollout.max_response_tokens"
        return own, "evaluation.max_response_tokens"

    @property
    def run_path(self) -> Path:
        return Path(self.logging.run_dir)
