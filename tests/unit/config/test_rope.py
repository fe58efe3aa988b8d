"""RoPE's spellings in a config.json, against what transformers reads from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from gspo_moe.config import PRESETS, Architecture, ConfigError, architecture_from_hf
from gspo_moe.config.rope import Yarn
from gspo_moe.config.validation import validated

BASE = Architecture(**PRESETS["tiny"], vocab_size=54).to_hf()
UNSPELLED = {key: value for key, value in BASE.items() if key not in ("rope_theta", "rope_scaling")}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}

SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta alone": {"rope_theta": 500.0},
    "transformers 5, unscaled": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "theta in rope_scaling": {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
    "transformers 5": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}},
    "transformers 4": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "early transformers 4": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN}},
    "type in rope_parameters": {"rope_parameters": {"type": "yarn", "rope_theta": 500.0, **YARN}},
    "both kinds": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}},
    "both sections": {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "yarn", **YARN},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN},
    },
    "no original length": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "original length on top": {
        "original_max_position_embeddings": 128, "rope_scaling": {"type": "yarn", "factor": 2.0},
    },
    "every parameter": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, **YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3,
            "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False,
        }
    },
}  # fmt: skip


def read(folder: Path, hf: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(hf))
    return architecture_from_hf(folder)


def said(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' parameters without nulls and the old name of the kind."""
    return {key: value for key, value in rope.items() if value is not None and key != "type"}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_as_in_transformers_and_is_written_back(spelling: str, tmp_path: Path) -> None:
    hf = UNSPELLED | SPELLINGS[spelling]
    architecture = read(tmp_path, hf)
    config = Qwen3MoeConfig.from_dict(json.loads(json.dumps(hf)))
    config.standardize_rope_params()  # as their RoPE does first
    theirs = said(config.rope_parameters)
    ours: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling is not None:
        ours |= architecture.rope_scaling.model_dump()
    defaults = {name: field.default for name, field in Yarn.model_fields.items() if not field.is_required()}
    assert ours.pop("rope_type") == theirs.pop("rope_type")
    assert {name: value for name, value in ours.items() if name in theirs or value != defaults.get(name)} == theirs
    assert read(tmp_path, architecture.to_hf()) == architecture
    assert Qwen3MoeConfig.from_dict(architecture.to_hf()).rope_parameters.items() >= theirs.items()


def test_a_factor_of_null_is_the_ratio_of_the_lengths(tmp_path: Path) -> None:
    architecture = read(tmp_path, BASE | {"rope_scaling": {"type": "yarn", **YARN, "factor": None}})
    assert architecture.rope_scaling == Yarn(factor=1024 / 256, original_max_position_embeddings=256)


@pytest.mark.parametrize("factor", [4.0, 2.5, 1.5])
def test_yarn_extends_the_original_positions_and_takes_none_away(factor: float, tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 512}
    architecture = read(tmp_path, BASE | {"rope_scaling": scaling})
    assert architecture.max_position_embeddings == 1024
    assert architecture.max_positions == max(1024, int(512 * factor))


def test_an_override_may_ask_for_yarn() -> None:
    values = {**PRESETS["tiny"], "vocab_size": 54, "rope_scaling": YARN}
    assert validated(Architecture, values).rope_scaling == Yarn(**YARN)
    with pytest.raises(ConfigError, match=r"rope_scaling\.rope_type='linear'"):
        validated(Architecture, values | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})


REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_type='linear'",)),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_type='dynamic'",)),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ("rope_type='llama3'",)),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ("rope_type='longrope'",)),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", **YARN}}, ("type='yarn'", "rope_type='linear'")),
    ({"rope_scaling": {"factor": 2.0}}, ("factor=2.0", "rope_type")),
    ({"original_max_position_embeddings": 128}, ("original_max_position_embeddings=128", "rope_type")),
    ({"rope_parameters": {"rope_theta": 500.0}}, ("rope_theta", "10000.0", "500.0", "rope_parameters")),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", **YARN}},
        ("rope_parameters", "rope_scaling", "'default'", "'yarn'"),
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", **YARN, "beta_fast": 16}, "rope_scaling": {"type": "yarn", **YARN}},
        ("rope_parameters", "rope_scaling", "differ in beta_fast"),
    ),
    ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling.factor is missing",)),
    ({"rope_scaling": {"type": "yarn", **YARN, "factor": 0.5}}, ("rope_scaling.factor=0.5",)),
    ({"rope_scaling": {"type": "yarn", **YARN, "beta": 16}}, ("unknown key", "rope_scaling.beta=16")),
    ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": 1, "beta_slow": 2}}, ("beta_fast=1.0", "beta_slow=2.0")),
    ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", **YARN}}, ("rope_theta=1.0",)),
    ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "1.0")),
    ({"rope_scaling": "yarn"}, ("rope_scaling='yarn'", "section")),
]


@pytest.mark.parametrize(("change", "parts"), REFUSED)
def test_what_is_not_supported_or_differs_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, BASE | change)
    for part in ("config.json", *parts):
        assert part in str(caught.value)
    assert "None" not in str(caught.value)
