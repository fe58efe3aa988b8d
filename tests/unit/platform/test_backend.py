import importlib
import sys
from types import ModuleType

import pytest
import torch

from gspo_moe.errors import ConfigError
from gspo_moe.platform import Backends, adam_of, backend, prepare_megatron
from gspo_moe.platform.backend import LAYERS, choose_backends, fused_adam


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


def choose(dtype: str = "bf16", wanted: str = "auto", **parts: str) -> Backends:
    return choose_backends({**dict.fromkeys(LAYERS, wanted), "optimizer": "auto", **parts}, dtype)


def names(chosen: Backends) -> list[str]:
    return [getattr(chosen, part).name for part in LAYERS]


@pytest.mark.parametrize("wanted", ["auto", "transformer_engine"])
def test_transformer_engine_is_taken_where_it_can_run(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True, installed=True)
    assert names(choose(wanted=wanted)) == ["transformer_engine"] * 3
    assert names(choose(wanted="local")) == ["local"] * 3
    assert names(choose(wanted=wanted, attention="local")) == ["transformer_engine", "local", "transformer_engine"]
    assert choose(wanted=wanted, attention="local").attention.why == "model.backend.attention=local"


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
    assert names(choose(dtype)) == ["local"] * 3
    with pytest.raises(
        ConfigError, match=f"^model.backend=transformer_engine cannot run here: .*{why}.*model.backend=local"
    ):
        choose(dtype, wanted="transformer_engine")
    with pytest.raises(
        ConfigError, match=f"^model.backend.norms=transformer_engine cannot.*{why}.*, or set model.backend.norms=local$"
    ):
        choose(dtype, norms="transformer_engine")
    assert names(choose(dtype, wanted="local")) == ["local"] * 3


def test_an_adam_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "fused_adam", lambda: "Apex")
    assert choose(wanted="local", optimizer="local") == choose(wanted="local")
    with pytest.raises(ConfigError, match=r"model\.backend\.optimizer=transformer_engine .* set .*optimizer=auto$"):
        choose(wanted="local", optimizer="transformer_engine")
    monkeypatch.setattr(backend, "fused_adam", lambda: "Transformer Engine")
    choose(wanted="local", optimizer="transformer_engine")


def test_the_local_adam_is_torchs_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_megatron()
    optimizer = importlib.import_module("megatron.core.optimizer")
    monkeypatch.setattr(optimizer, "Adam", "fused")
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    with adam_of("auto"):
        assert (optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER) == ("fused", False)
    with adam_of("local"):
        assert (optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER) == (torch.optim.AdamW, True)
    assert (optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER) == ("fused", False)


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
