"""What a run says of ranks that the others wait for: for ever, or for longer than they should."""

from __future__ import annotations

from types import TracebackType

from gspo_moe.errors import GspoMoeError, RankError
from gspo_moe.observability.slow_ranks import SlowRanks
from gspo_moe.parallel.heartbeat import Heartbeat
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.training.session import Trainer

NOTES = "ranks"  # in the run's folder


class Watch:
    """Around the work of a trainer. Of a collective that timed out it makes a RankError that names who did not come."""

    def __init__(self, trainer: Trainer) -> None:
        session, self._slow = trainer.session, SlowRanks()
        self._groups = session.groups
        self._heartbeat = Heartbeat(
            session.run_path / NOTES,
            self._groups.rank,
            self._groups.world_size,
            session.timers,
            lambda: trainer.progress.step + 1,
            60 * session.config.parallel.timeout_minutes,
        )

    def step_is_done(self) -> None:
        """Looks for slow ranks. Collective."""
        if self._groups.world_size == 1:
            return
        busy = gather_objects(dict(self._heartbeat.busy()))
        if self._groups.is_main:
            self._slow.add(busy)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._groups.world_size > 1 and _timed_out(error):
                raise RankError(self._heartbeat.missing()) from error
        finally:
            self._heartbeat.close()


def _timed_out(error: BaseException | None) -> bool:
    """Of a collective; torch has no class of error for it."""
    foreign = isinstance(error, RuntimeError) and not isinstance(error, GspoMoeError)
    return foreign and "timed out" in str(error).lower()
