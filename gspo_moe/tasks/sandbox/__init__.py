"""Runs Python programs that nobody trusts: in bubblewrap, or, where the config allows it, without (docs/sandbox.md)."""

from gspo_moe.tasks.sandbox.cases import ProgramTests
from gspo_moe.tasks.sandbox.options import SandboxOptions
from gspo_moe.tasks.sandbox.running import Ran
from gspo_moe.tasks.sandbox.sandbox import Sandbox, Verdict

__all__ = ["ProgramTests", "Ran", "Sandbox", "SandboxOptions", "Verdict"]
