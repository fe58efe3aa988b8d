import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.errors import KernelError
from gspo_moe.kernels import build, library
from gspo_moe.kernels.build import library_fingerprint


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


def extension(**constants: Any) -> SimpleNamespace:
    return SimpleNamespace(__file__="_C.so", **{"sources": library_fingerprint(), **constants})


@pytest.mark.parametrize("sources", ["0123456789abcdef", None])
def test_a_library_of_other_sources_is_refused(sources: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = extension(cpu="avx2", with_cuda=0, sources=sources)
    if sources is None:
        del stale.sources  # as in one that was built before it had a fingerprint
    with pytest.raises(KernelError, match=r"_C\.so was built of other sources .* bash launch/install\.sh"):
        loads(monkeypatch, stale)
    monkeypatch.setattr(library, "library_fingerprint", lambda: None)  # as in a wheel
    assert loads(monkeypatch, stale).cpu == "avx2"


def test_any_source_and_flag_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.CSRC, tmp_path / "csrc")
    assert library_fingerprint(tmp_path / "csrc") == library_fingerprint()
    with (tmp_path / "csrc" / "cuda" / "exponent.cuh").open("a") as file:
        file.write("\n")
    assert library_fingerprint(tmp_path / "csrc") != library_fingerprint()
    assert library_fingerprint(tmp_path / "wheel") is None
    before = library_fingerprint()
    monkeypatch.setattr(build, "CPU_FLAGS", ("-O2",))
    assert library_fingerprint() != before


def test_what_is_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loads(monkeypatch, extension(cpu="avx2", with_cuda=1))
    assert found.summary == ("CPU (avx2) and CUDA", "")


def test_what_is_missing_comes_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loads(monkeypatch, extension(cpu="generic", with_cuda=0))
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
