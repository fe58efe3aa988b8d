"""The project's errors: what a user can mend, each with the fix in its message.

Every class also subclasses the nearest built-in error, so code that catches the built-in keeps working.
"""


class GspoMoeError(Exception):
    """Root of every error this project raises on purpose; the command line prints it without a stack trace.

    exit_code: what the command line then ends with.
    """

    exit_code = 2


class ConfigError(GspoMoeError, ValueError):
    """A configuration that cannot work; the message names key, value and fix."""


class DataError(GspoMoeError, ValueError):
    """Input data (prompts, token files, HF checkpoints) that cannot be read or does not fit the model."""


class RunError(GspoMoeError, RuntimeError):
    """Ends a run that had begun. Raised on every rank at once, so that together they can save the last whole step.

    saves: whether they should.
    """

    saves = True


class RolloutError(RunError):
    """Generation or scoring that cannot go on."""

    exit_code = 3


class RewardError(RunError):
    """Rewards of which nothing can be learnt: all failed, or no two of them differ."""

    exit_code = 4


class TrainingError(RunError):
    """Updates that cannot go on, or weights or moments that are not finite."""

    exit_code = 5


class CollapseError(RunError):
    """The bounds of `guard` were left for too long."""

    exit_code = 6

    def __init__(self, message: str, *, saves: bool = True) -> None:
        super().__init__(message)
        self.saves = saves


class DivergenceError(TrainingError):
    """Ranks, or trainer and rollouts, no longer have the same weights."""

    exit_code = 7
    saves = False


class Interrupted(RunError):
    """A signal, or the end of its time, asked the run to end, and it did as asked."""

    exit_code = 0


class RankError(GspoMoeError, RuntimeError):
    """A rank that does not come to where the others wait for it."""

    exit_code = 9


class NotReproduced(GspoMoeError, ArithmeticError):
    """A replayed mini-batch that is not what its run found."""

    exit_code = 8


class OutputError(GspoMoeError, OSError):
    """Results that cannot be written while the work goes on: a full disk, a quota."""


class CheckpointError(GspoMoeError, RuntimeError):
    """A checkpoint that is missing, incomplete or does not fit this run."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not as it was written, or is not what stood there."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; those before it are as they were. Raised on every rank at once."""


class KernelError(GspoMoeError, RuntimeError):
    """A kernel that is missing, was built for another machine, or got arguments it cannot take."""


class ParityError(GspoMoeError, RuntimeError):
    """Layouts or precisions in which one model gave other numbers than allowed, or none."""

    exit_code = 1


class StudyError(GspoMoeError, RuntimeError):
    """A study of which some runs failed; the others are finished and summarised."""
