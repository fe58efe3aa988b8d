"""Whose parts the model and its optimizer are made of: `model.backend`. Torch-free."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from gspo_moe.section import Section

BackendName = Literal["auto", "local", "transformer_engine"]
NAMES = get_args(BackendName)


class BackendConfig(Section):
    """By part; one name in place of the section stands for experts, attention and norms, with `optimizer: auto`.

    `auto` takes Transformer Engine's where it can run on this machine, else what `local` names.
    experts: `local` stacks them and multiplies by torch's grouped product.
    attention: with the linear layers around it; `local` has torch's kernel and megatron-core's linear layers.
    norms: `local` has torch's.
    optimizer: whose Adam. `auto` takes Transformer Engine's, else NVIDIA Apex's, else torch's, by what is installed;
    `local` torch's.
    """

    experts: BackendName = "auto"
    attention: BackendName = "auto"
    norms: BackendName = "auto"
    optimizer: BackendName = "auto"

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in NAMES:
            raise ValueError(f"expected {', '.join(NAMES)}, or such a name by part: {', '.join(cls.model_fields)}")
        return dict.fromkeys(("experts", "attention", "norms"), value)
