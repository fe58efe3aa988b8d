"""Writes a run's metrics: metrics.jsonl and TensorBoard always, Weights & Biases when configured."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gspo_moe.config.checks import WANDB_MISSING, wandb_mode
from gspo_moe.config.schema import WandbConfig
from gspo_moe.errors import ConfigError
from gspo_moe.observability.catalog import describe
from gspo_moe.observability.jsonl import JsonLines
from gspo_moe.observability.tensorboard import TensorBoard


class MetricsWriter:
    """One writer a run, on one rank.

    run_dir: gets metrics.jsonl, tensorboard/ and, with W&B, wandb/ and wandb_id.
    resume_step: step of the checkpoint that the run continues from; later steps of an earlier attempt vanish (see
        `JsonLines`; TensorBoard hides them). 0 starts anew.
    config_dump: the resolved config, for W&B.
    Raises ConfigError when W&B is wanted and not installed or does not start, DataError when metrics.jsonl is damaged.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int = 0,
        wandb: WandbConfig | None = None,
        config_dump: dict[str, Any] | None = None,
    ) -> None:
        folder = Path(run_dir)
        self._lines = JsonLines(folder / "metrics.jsonl", resume_step)
        self._tensorboard = TensorBoard(folder / "tensorboard", resume_step)
        self._wandb = None if wandb is None else _start_wandb(folder, wandb, resume_step, config_dump)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line `{"step", "time" (unix seconds), name: value, ...}`; NaN and infinities become null.

        Raises KeyError for a name that is not in the catalog.
        """
        values = {name: float(value) for name, value in metrics.items()}
        for name in values:
            describe(name)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append({"step": step, "time": time.time(), **finite})
        self._tensorboard.write(step, values)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def flush(self) -> None:
        """Raises OSError where metrics.jsonl does not take them."""
        self._lines.flush()

    def is_gone(self) -> bool:
        """Whether metrics.jsonl is no longer where it was written."""
        return self._lines.is_gone()

    def close(self) -> None:
        self._lines.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start_wandb(run_dir: Path, settings: WandbConfig, resume_step: int, config_dump: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise ConfigError(WANDB_MISSING) from None
    id_file = run_dir / "wandb_id"
    mode = wandb_mode(settings)
    try:
        run = wandb.init(
            project=settings.project,
            name=settings.name,
            mode=mode,
            dir=str(run_dir),
            config=config_dump,
            id=id_file.read_text() if resume_step and id_file.exists() else None,
            resume="allow",
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        raise ConfigError(
            f"logging.wandb with mode {mode}: wandb could not start ({error}); mend that, or set "
            "logging.wandb.mode=offline or logging.wandb=null"
        ) from error
    id_file.write_text(run.id)
    # W&B drops values whose own step goes back, which a continued run's does.
    run.define_metric("*", step_metric="step")
    return run
