"""The filter of system calls, run as the kernel runs it: by the manual's meaning of its instructions."""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from gspo_moe.tasks.sandbox.seccomp import call_filter

ALLOWED, KILLED = "allowed", "killed"
X86_64, AARCH64 = 0xC000003E, 0xC00000B7


def verdict(program: bytes, architecture: int, number: int, first: int = 0) -> str | int:
    """What becomes of a call; a number is the errno that it gets."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, first, 0, 0, 0, 0, 0)
    steps = list(struct.iter_unpack("=HBBI", program))
    at, value = 0, 0
    while True:
        code, yes, no, constant = steps[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif code == 0x06:
            kinds = {0x7FFF0000: ALLOWED, 0x80000000: KILLED}
            return kinds.get(constant) or constant & 0xFFFF
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
            at += yes if holds else no


CALLS = {  # read, write, openat, execve, futex, socketpair; ptrace, unshare; clone, clone3, prlimit64; socket, kill
    "x86_64": (X86_64, (0, 1, 257, 59, 202, 53), (101, 272), 56, 435, 302, (41, 62)),
    "aarch64": (AARCH64, (63, 64, 56, 221, 98, 199), (117, 97), 220, 435, 261, (198, 129)),
}


@pytest.mark.parametrize("machine", CALLS)
@pytest.mark.parametrize("namespaces", [True, False])
def test_calls_are_allowed_and_denied(machine: str, namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    architecture, plain, denied, clone, clone3, prlimit, outward = CALLS[machine]
    program = call_filter(namespaces)

    def found(number: int, first: int = 0) -> str | int:
        return verdict(program, architecture, number, first)

    assert {found(number) for number in plain} == {ALLOWED}
    assert {found(number) for number in denied} == {errno.EPERM}
    assert {found(number) for number in outward} == {ALLOWED if namespaces else errno.EPERM}
    assert [found(clone, flags) for flags in (17, 0x01200011, 0x10000011)] == [ALLOWED, ALLOWED, errno.EPERM]
    assert found(clone3) == errno.ENOSYS
    assert [found(prlimit, pid) for pid in (0, 1)] == [ALLOWED, errno.EPERM]
    assert found(0x40000001) == errno.EPERM
    assert verdict(program, 0x40000003, 1) == KILLED  # 32-bit calls have other numbers


def test_an_unknown_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert call_filter(True) == b""
