"""The project's errors: what a user can mend, each with the fix in its message.

Every class also subclasses the nearest built-in error, so code that catches the built-in keeps working.
"""


class GspoMoeError(Exception):
    """Root of every error this project raises on purpose; the command line prints it without a stack trace."""


class ConfigError(GspoMoeError, ValueError):
    """A configuration that cannot work; the message names key, value and fix."""


class DataError(GspoMoeError, ValueError):
    """Input data (prompts, token files, HF checkpoints) that cannot be read or does not fit the model."""


class RolloutError(GspoMoeError, RuntimeError):
    """Generation or scoring that cannot go on."""


class RewardError(GspoMoeError, RuntimeError):
    """A reward function that failed where the configuration says that a failure is fatal."""


class CheckpointError(GspoMoeError, RuntimeError):
    """A checkpoint that is missing, incomplete or does not fit this run."""


class KernelError(GspoMoeError, RuntimeError):
    """A kernel that is missing, was built for another machine, or got arguments it cannot take."""


class StudyError(GspoMoeError, RuntimeError):
    """A study of which some runs failed; the others are finished and summarised."""
