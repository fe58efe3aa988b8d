import importlib.metadata
import platform
from pathlib import Path

import pytest
import torch

from gspo_moe import __version__
from gspo_moe.errors import ConfigError
from gspo_moe.platform import (
    ANSWERS,
    Backend,
    Backends,
    doctor,
    has_nvidia_apex,
    has_transformer_engine,
    megatron_version,
)


def line(name: str) -> str:
    (found,) = (row for row in doctor.report().splitlines() if row.startswith(name + " "))
    return found.removeprefix(name).strip()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def absent(*_: object) -> str:
    raise ConfigError("megatron-core is not installed; do this")


def test_versions_are_those_of_the_packages_in_use() -> None:
    assert line("gspo_moe").startswith(f"{__version__} - ")
    assert line("python") == platform.python_version()
    assert line("torch").split(" - ")[0] == torch.__version__
    assert line("megatron-core") == importlib.metadata.version("megatron-core") == megatron_version()


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_says_so_and_lists_every_answer_to_megatron() -> None:
    assert line("device").startswith(f"CPU, {torch.get_num_threads()} threads - no GPU: gloo")
    report = doctor.report()
    for answer in ANSWERS:
        assert f"  {answer.asked} -> {answer.answered}: {answer.reason}\n" in report + "\n"


def test_with_a_gpu_it_names_it_and_lists_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert line("device") == "NVIDIA H200"
    assert not any(answer.reason in doctor.report() for answer in ANSWERS)


def test_what_was_chosen_comes_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("transformer_engine", "it is there")
    chosen = Backends(backend, backend, backend)
    monkeypatch.setattr(
        doctor, "choose_backends", lambda wanted, dtype: chosen if {*wanted.values()} == {"auto"} else 0
    )
    monkeypatch.setattr(doctor, "fused_adam", lambda: "Apex")
    assert line("model.backend=auto") == "transformer_engine - it is there"
    assert line("optimizer").startswith("Apex's FusedAdam - megatron-core takes")
    monkeypatch.setattr(doctor, "fused_adam", lambda: None)
    assert line("optimizer").startswith("torch's fused AdamW - megatron-core takes")
    for gpu, collectives in ((True, "nccl"), (False, "gloo")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        assert line("collectives").startswith(f"{collectives} - between")


def test_absent_packages_say_what_runs_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert line("Transformer Engine") == "absent - local layers, experts by torch's grouped product"
    assert line("packages").startswith("missing - torch, megatron-core, ")
    assert line("NVIDIA Apex") == "absent - torch's fused AdamW, unless Transformer Engine brings its own"
    assert line("nvcc") == "absent"
    assert line("torch").endswith("CPU build: will not see a GPU")


def test_present_packages_need_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: {"transformer-engine": "2.9"}.get(name, "1"))
    assert line("Transformer Engine") == "2.9"
    assert line("packages") == "all there"
    assert line("NVIDIA Apex") == "found"
    assert line("nvcc") == "/opt/nvcc"


def test_a_missing_or_untried_megatron_is_reported_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "megatron_version", lambda: "0.11.0")
    assert line("megatron-core").startswith("0.11.0 - megatron-core 0.11.0 was not tried")
    monkeypatch.setattr(doctor, "megatron_version", absent)
    assert line("megatron-core") == "absent - megatron-core is not installed; do this"


def test_the_other_package_called_apex_is_not_taken_for_nvidias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex.py").touch()
    assert not has_nvidia_apex()
    (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_nvidia_apex()


def test_transformer_engine_is_what_can_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert has_transformer_engine() == (doctor.importlib.util.find_spec("transformer_engine") is not None)
    (tmp_path / "transformer_engine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_transformer_engine()
