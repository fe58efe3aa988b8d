"""Figures by layer in one compact file: routing_layers.safetensors in the run's folder.

Schema: for each figure two tensors, `<name>/steps` int64 [S], ascending, and `<name>/values` float32 [S, A] or
[S, A, ...], NaN where there is no value; A MoE layers. Names are those of the metrics of which they are the layers:

- routing/{staleness,update,engine}/{slot_change,flip_rate,response_set_change}, routing/{..}/noise_floor/slot_change
- routing/{staleness,update}/router_margin; .../margin_tokens and .../margin_flips [S, A, B]: tokens and flips in each
  of the margin bins of routing/{..}/flip_rate_by_margin
- routing/load/tokens and routing/load/rollout/tokens [S, A, E]: tokens that each expert got
- routing/attribution/{phi_token,phi_sequence,washout}: with the routes of layers 0 to l held

Strategy: safetensors cannot be appended to, so the whole file is written beside the old one and takes its place. That
is done whenever the steps since the last time reach a sixteenth of all, so that the writing stays linear in the run's
length, and before every checkpoint. A kill leaves a whole file, at most a sixteenth of the run short; a run that goes
on from a checkpoint loses nothing.

Shape letters: S steps, A MoE layers, B margin bins, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gspo_moe.errors import DataError
from gspo_moe.files import write_whole

FILE = "routing_layers.safetensors"
_log = logging.getLogger(__name__)
Series = dict[str, tuple[np.ndarray, np.ndarray]]


class LayerWriter:
    """One writer a run, on one rank; keeps the run's figures in memory, in as many bytes as the file has.

    resume_step: step of the checkpoint that the run continues from; what an earlier attempt wrote after it vanishes. 0
    starts anew. Raises DataError when the existing file is damaged.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        self._path = Path(run_dir) / FILE
        self._written: Series = {}
        self._new: dict[str, dict[int, np.ndarray]] = {}  # not written yet
        self._pending = 0
        if resume_step and self._path.exists():
            for name, (steps, values) in read_layers(self._path).items():
                kept = steps <= resume_step
                if kept.any():
                    self._written[name] = steps[kept], values[kept]
        else:
            self._path.unlink(missing_ok=True)

    def append(self, step: int, figures: Mapping[str, np.ndarray]) -> None:
        """figures: by name, [A] or [A, ...] of numbers."""
        for name, value in figures.items():
            self._new.setdefault(name, {})[step] = np.asarray(value, dtype=np.float32)
        self._pending += 1
        written = {name: len(steps) for name, (steps, _) in self._written.items()}
        new = {name: len(by_step) for name, by_step in self._new.items()}
        if self._pending >= max((written.get(name, 0) + new.get(name, 0) for name in written | new), default=1) / 16:
            self.try_flush()

    def try_flush(self) -> None:
        """As `flush`, but a warning tells where it cannot: the figures stay in memory."""
        try:
            self.flush()
        except (OSError, SafetensorError) as error:
            _log.warning("%s cannot be written (%s); its figures are kept in memory until it can", self._path, error)

    def flush(self) -> None:
        """Writes what is not written yet. Raises OSError or SafetensorError where it cannot."""
        if not self._pending or not (self._new or self._written):
            return
        for name, by_step in self._new.items():
            steps, values = np.array(list(by_step), dtype=np.int64), np.stack(list(by_step.values()))
            if name in self._written:
                before = self._written[name]
                steps, values = np.concatenate([before[0], steps]), np.concatenate([before[1], values])
            self._written[name] = steps, values
        self._new.clear()
        tensors = {f"{name}/steps": steps for name, (steps, _) in self._written.items()}
        tensors |= {f"{name}/values": values for name, (_, values) in self._written.items()}
        write_whole(self._path, lambda partial: save_file(tensors, partial))
        self._pending = 0


def read_layers(path: Path) -> Series:
    """Steps int64 [S] and values float32 [S, A, ...] by name; raises DataError for a damaged file."""
    try:
        tensors = load_file(path)
        names = [name.removesuffix("/steps") for name in tensors if name.endswith("/steps")]
        found = {name: (tensors[f"{name}/steps"], tensors[f"{name}/values"]) for name in sorted(names)}
        for name, (steps, values) in found.items():
            if steps.dtype != np.int64 or steps.ndim != 1 or values.ndim < 2 or len(steps) != len(values):
                raise ValueError(f"{name} has no row of values a step")
        return found
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it: the run's other files do not need it") from error
