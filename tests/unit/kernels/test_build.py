"""The build of the CUDA kernels: when it is made and what it refuses; `cuda/test_proof.py` runs the compilers."""

from pathlib import Path

import pytest

from gspo_moe.kernels import build
from gspo_moe.kernels.build import (
    ARCHITECTURES,
    FAMILIES,
    BuildError,
    Family,
    KernelUse,
    Toolkit,
    check_resources,
    resource_use,
)

PTXAS = """ptxas info    : Compiling entry function '_Zk' for '{architecture}'
ptxas info    : Function properties for _Zk
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 768 bytes smem, 432 bytes cmem[0]
"""


def said(architecture: str, registers: int = 40, stack: int = 0, stores: int = 0, loads: int = 0) -> str:
    return PTXAS.format(architecture=architecture, registers=registers, stack=stack, stores=stores, loads=loads)


def test_what_ptxas_says_is_read() -> None:
    (use,) = resource_use(FAMILIES[0], said("sm_100", registers=63, stack=8, stores=12, loads=4))
    assert (use.kernel, use.architecture, use.registers, use.stack, use.spills) == ("_Zk", "sm_100", 63, 8, 16)


def sound() -> list[KernelUse]:
    """One kernel of every family on every architecture, each as large as it may be."""
    return [
        use
        for family in FAMILIES
        for name in ARCHITECTURES
        for use in resource_use(family, said(name, registers=family.max_registers))
    ]


@pytest.mark.parametrize("fault", [{"registers": 65}, {"stack": 8}, {"stores": 4}, {"loads": 4}])
def test_spills_local_memory_and_too_many_registers_are_refused(fault: dict[str, int]) -> None:
    check_resources(sound())
    with pytest.raises(BuildError, match="sm_80"):
        check_resources([*sound(), *resource_use(FAMILIES[0], said("sm_80", **fault))])


def test_each_family_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Family("wide", ("wide.cu",), 255)
    monkeypatch.setattr(build, "FAMILIES", (*FAMILIES, wide))
    uses = [*sound(), *(use for name in ARCHITECTURES for use in resource_use(wide, said(name, registers=255)))]
    check_resources(uses)
    assert "1 wide of 255 to 255 registers" in build.summarize(uses)[0]
    with pytest.raises(BuildError, match="255 registers of 64"):
        check_resources([*uses, *resource_use(FAMILIES[1], said("sm_80", registers=255))])


def test_every_cuda_source_belongs_to_a_family() -> None:
    assert sorted(build.LAUNCHERS) == sorted(path.name for path in build.SOURCES.glob("*.cu"))


def test_an_architecture_without_kernels_is_refused() -> None:
    with pytest.raises(BuildError, match="sm_100"):
        check_resources([use for use in sound() if use.architecture != "sm_100"])
    with pytest.raises(BuildError, match="sequence_reduce for sm_80"):
        check_resources([use for use in sound() if use.family is not FAMILIES[1]])


@pytest.mark.parametrize(
    ("mode", "version", "built"),
    [("auto", (13, 0), True), ("1", (12, 8), True), ("0", (13, 0), False), ("auto", (12, 4), False)],
)
def test_the_toolkit_is_taken_as_asked(
    mode: str, version: tuple[int, int], built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = Toolkit(Path("nvcc"), Path("cuda"), version)
    monkeypatch.setattr(build, "find_toolkit", lambda: toolkit)
    monkeypatch.setenv("GSPO_MOE_CUDA", mode)
    assert build.cuda_toolkit() == (toolkit if built else None)


@pytest.mark.parametrize("toolkit", [None, Toolkit(Path("nvcc"), Path("cuda"), (12, 4))])
def test_kernels_that_are_asked_for_must_be_built(toolkit: Toolkit | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_toolkit", lambda: toolkit)
    monkeypatch.setenv("GSPO_MOE_CUDA", "1")
    with pytest.raises(BuildError, match="install CUDA 12"):
        build.cuda_toolkit()
    monkeypatch.setenv("GSPO_MOE_CUDA", "yes")
    with pytest.raises(BuildError, match="set auto, 0 or 1"):
        build.cuda_toolkit()
