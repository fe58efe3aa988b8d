import importlib
import sys
from types import ModuleType

import pytest
import torch

from gspo_moe.errors import ConfigError
from gspo_moe.platform import backend, choose_backend, prepare_megatron
from gspo_moe.platform.backend import fused_adam


def machine(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, installed: bool, usable: bool = True, grouped: bool = True
) -> None:
    """A machine with or without a GPU and a Transformer Engine, which megatron-core can use or not."""
    prepare_megatron()
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(backend, "has_transformer_engine", lambda: installed)
    monkeypatch.setattr(extension, "HAVE_TE", usable)
    monkeypatch.setattr(extension, "TEColumnParallelGroupedLinear", object if grouped else None)


@pytest.mark.parametrize("wanted", ["auto", "transformer_engine"])
def test_transformer_engine_is_taken_where_it_can_run(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True, installed=True)
    assert choose_backend(wanted, "bf16").name == "transformer_engine"
    assert choose_backend("local", "bf16").name == "local"


@pytest.mark.parametrize(
    ("parts", "dtype", "why"),
    [
        ({"gpu": False, "installed": True}, "bf16", "no GPU"),
        ({"gpu": True, "installed": False}, "bf16", "is not installed; run `pip install"),
        ({"gpu": True, "installed": True}, "fp32", "TF32.*set model.dtype=bf16"),
        ({"gpu": True, "installed": True, "usable": False}, "bf16", "does not import"),
        ({"gpu": True, "installed": True, "grouped": False}, "bf16", "older than 1.9"),
    ],
)
def test_where_it_cannot_run_auto_says_why_and_asking_for_it_is_an_error(
    parts: dict[str, bool], dtype: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **parts)
    chosen = choose_backend("auto", dtype)
    assert chosen.name == "local"
    with pytest.raises(
        ConfigError, match=f"^model.backend=transformer_engine cannot run here: .*{why}.*model.backend=local"
    ):
        choose_backend("transformer_engine", dtype)


def test_the_first_fused_adam_that_imports_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"transformer_engine.pytorch.optimizers": "Transformer Engine", "apex.optimizers": "Apex", "torch": None}
    for module in list(owners):
        monkeypatch.setattr(importlib, "import_module", import_only(set(owners)))
        assert fused_adam() == owners.pop(module)


def import_only(known: set[str]) -> object:
    def import_module(name: str) -> ModuleType:
        if name not in known:
            raise ImportError(name)
        return sys

    return import_module
