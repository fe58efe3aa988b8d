"""Whether a run's figures have left the bounds of `guard`, and for how long: counting alone, no files, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gspo_moe.config.guard import METRIC_OF, GuardConfig


@dataclass(frozen=True)
class Collapse:
    """A figure that was out of its bounds in each step from `first` to `last`; words: which, how, and for how long."""

    first: int
    last: int
    words: str


class Guard:
    """Looks at every step once, in order."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._since: dict[str, int] = {}  # the first step of those in a row, by bound

    @property
    def watches(self) -> bool:
        return bool(self._config.bounds)

    @property
    def first_bad(self) -> int | None:
        """The first of the latest steps that all had some figure out of bounds; None after a sound one."""
        return min(self._since.values(), default=None)

    def wanted(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What `look` needs of a step's metrics."""
        names = [METRIC_OF[name] for name in self._config.bounds]
        return {name: metrics[name] for name in names if name in metrics}

    def look(self, step: int, metrics: Mapping[str, float]) -> Collapse | None:
        """What a step's metrics bring to an end, if they do; a figure that a step does not have counts as sound."""
        found = None
        for name in self._config.bounds:
            fault = self._fault(name, metrics)
            if fault is None:
                self._since.pop(name, None)
                continue
            first = self._since.setdefault(name, step)
            if found is None and step - first + 1 >= self._config.patience:
                found = Collapse(first, step, f"{fault}, and was out of its bounds in each step from {first} to {step}")
        return found

    def forget(self) -> None:
        """Of a run that was taken back to before the first bad step."""
        self._since.clear()

    def bad_steps(self, step: int) -> int:
        """How many steps in a row, up to `step`, the figure has been out of its bounds that has been so longest."""
        return 0 if self.first_bad is None else step - self.first_bad + 1

    def _fault(self, name: str, metrics: Mapping[str, float]) -> str | None:
        metric, bounds = METRIC_OF[name], self._config.bounds[name]
        value = metrics.get(metric)
        if value is None:
            return None
        if bounds.low is not None and not value >= bounds.low:
            return f"{metric} is {value:.4g}, not at least guard.{name}.low={bounds.low:g}"
        if bounds.high is not None and not value <= bounds.high:
            return f"{metric} is {value:.4g}, not at most guard.{name}.high={bounds.high:g}"
        return None
