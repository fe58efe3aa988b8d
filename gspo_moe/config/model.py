"""The sections `model` and `tokenizer`: whose weights, in which form, and what cuts text into tokens. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from gspo_moe.config.architecture import PRESETS, Architecture, architecture_from_hf
from gspo_moe.config.backend import BackendConfig
from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError
from gspo_moe.section import Section


class ModelConfig(Section):
    """Which model. `preset` names sizes; `hf` is a folder with config.json and, unless `random_init`, weights.

    checkpoint: a folder of megatron-core's with config.json, written by `gspo-moe convert` or by a run (its
    `checkpoints/step_*`); only the weights are read.
    backend: whose experts, attention, norms and optimizer; a single name stands for the first three.
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
    backend: BackendConfig = BackendConfig()
    fused_log_probs: bool = True
    log_prob_memory_mib: PositiveInt = 512
    deterministic: bool = True

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}; known are {', '.join(PRESETS)}, or set model.hf to a folder")
        return value

    def faults(self) -> Iterator[str]:
        sources = {"model.preset": self.preset, "model.hf": self.hf, "model.checkpoint": self.checkpoint}
        given = {key: source for key, source in sources.items() if source is not None}
        if len(given) != 1:
            named = " and ".join(f"{key}={source!r}" for key, source in (given or sources).items())
            yield f"{named}: set one of them and leave the other null"
        if self.random_init and self.checkpoint is not None:
            yield "model.random_init=true leaves model.checkpoint unread; name its folder in model.hf"
        if self.folder is None and self.preset is not None:
            try:
                self.architecture(vocab_size=1)
            except ConfigError as error:
                yield str(error)

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
