"""Sandboxes for tests: in bubblewrap, and without it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.sandbox import Sandbox, SandboxOptions
from gspo_moe.tasks.sandbox import sandbox as module
from gspo_moe.tasks.sandbox.command import interpreter_of

KEY = "task.reward.options"
WAYS = ("bubblewrap", "without")


def sandbox(way: str, **options: Any) -> Sandbox:
    """Skips the test where programs cannot be run in that way here. way: of `WAYS`, or the first that works."""
    if way == "either":
        way = WAYS[0] if module._refusal(interpreter_of(None, KEY)) is None else WAYS[1]
    if way == "bubblewrap":
        try:
            return Sandbox(SandboxOptions(**options), KEY)
        except ConfigError as error:
            pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_refusal", lambda interpreter: "bubblewrap is left out by a test")
        faults = []
        for python in (None, *filter(None, [shutil.which("python3", path="/usr/local/bin:/usr/bin")])):
            try:
                return Sandbox(SandboxOptions(allow_without_bubblewrap=True, python=python, **options), KEY)
            except ConfigError as error:
                faults.append(str(error))
    pytest.skip(faults[-1])


def alive(mark: str) -> list[int]:
    """Processes with `mark` in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            continue
    return found
