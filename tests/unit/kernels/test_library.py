import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.kernels import library


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for cached in (library.kernels, library.note_reference):
        cached.cache_clear()
    yield
    for cached in (library.kernels, library.note_reference):
        cached.cache_clear()


def loads(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> library.Kernels:
    def import_module(name: str) -> Any:
        assert name == "gspo_moe.kernels._C"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", import_module)
        return library.kernels()


def test_what_is_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loads(monkeypatch, SimpleNamespace(cpu="avx2", with_cuda=1))
    assert found.summary == ("CPU (avx2) and CUDA", "")


def test_what_is_missing_comes_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loads(monkeypatch, SimpleNamespace(cpu="generic", with_cuda=0))
    assert found.summary[0] == "CPU (generic)"
    assert "nvcc" in found.summary[1]
    assert library.BUILD in found.summary[1]


@pytest.mark.parametrize(
    ("error", "why"), [(ModuleNotFoundError("no _C"), "install g"), (ImportError("undefined symbol: f"), "symbol: f")]
)
def test_without_an_extension_the_reference_runs_and_is_logged_once(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = loads(monkeypatch, error)
    assert found.summary[0] == "PyTorch operators"
    assert why in found.missing
    assert library.BUILD in found.missing
    for _ in range(3):
        library.note_reference("cpu")
    (record,) = caplog.records
    assert found.missing in record.getMessage()
