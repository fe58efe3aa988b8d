"""What a run tells: metrics, samples, progress, timings; and the reader of all that."""

from gspo_moe.observability.reader import Run, load_run

__all__ = ["Run", "load_run"]
