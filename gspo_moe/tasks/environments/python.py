"""Python as a tool: each call is a program of its own in the sandbox; the value of a last expression is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import PositiveFloat

from gspo_moe.config.validation import validated
from gspo_moe.tasks.environments.calls import ToolEnvironment, ToolOptions, schema
from gspo_moe.tasks.sandbox import Sandbox, SandboxOptions

KEY = "task.environment.options"


class PythonOptions(ToolOptions, SandboxOptions):
    """total_seconds: for all calls of one turn."""

    total_seconds: PositiveFloat = 8.0


class Python:
    name, argument, lines = "python", "code", True

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    @property
    def schema(self) -> dict[str, Any]:
        return schema(
            self.name,
            "Runs Python code and gives what it prints and the value of its last expression. Nothing is kept "
            "between calls.",
            self.argument,
            "A whole program",
        )

    def call(self, argument: str, seconds: float) -> str:
        limit = min(seconds, self._sandbox.options.wall_seconds)
        ran = self._sandbox.run(argument, wall_seconds=limit, shows_value=True)
        said = ran.output.rstrip("\n")
        if ran.how == "ended":
            return said or "(no output)"
        return "\n".join(part for part in (said, f"error: {ran.reason}") if part)


def python(options: Mapping[str, Any]) -> ToolEnvironment:
    """Raises ConfigError as `Sandbox`, and for options that do not fit."""
    found = validated(PythonOptions, options, prefix=f"{KEY}.")
    return ToolEnvironment(Python(Sandbox(found, KEY)), found, found.total_seconds)
