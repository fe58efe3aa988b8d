"""Settings of the sandbox, a section of `task.reward.options` and `task.environment.options`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from gspo_moe.section import Section


class SandboxOptions(Section):
    """What one program may use, and what it runs in.

    cpu_seconds: of each of its processes, in whole seconds, rounded up. wall_seconds: of the program.
    memory_mb: address space of each process, and memory in use of all of them together.
    processes: and threads, all together. disk_mb: of its folder. output_kb: standard output and error, each.
    allow_without_bubblewrap: goes on, less closed, where bubblewrap is missing or cannot work (docs/sandbox.md).
    python: the interpreter that runs programs, with the packages that they may use; null is this one without packages.
    """

    cpu_seconds: PositiveFloat = 4.0
    wall_seconds: PositiveFloat = 6.0
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    processes: PositiveInt = 16
    disk_mb: PositiveInt = 16
    output_kb: PositiveInt = 4096
    allow_without_bubblewrap: bool = False
    python: str | None = None

    def faults(self) -> Iterator[str]:
        if self.wall_seconds < self.cpu_seconds:
            yield (
                f"wall_seconds={self.wall_seconds:g} is less than cpu_seconds={self.cpu_seconds:g}, "
                "which is then never reached; raise it"
            )
