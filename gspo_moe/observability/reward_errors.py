"""What went wrong with rewards, for the user to see: the first at once, and every batch's first in the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path

FILE = "reward_errors.txt"
_log = logging.getLogger(__name__)


def first_reward_error(run_dir: str | Path) -> str | None:
    """What a run wrote first, to its first empty line; None where no reward has failed."""
    file = Path(run_dir) / FILE
    text, end, _ = file.read_text(encoding="utf-8").partition("\n\n") if file.is_file() else ("", "", "")
    return text if end else None


class RewardErrors:
    """Appends to `run_dir`/reward_errors.txt; also what an attempt writes that a resumed run repeats stays there."""

    def __init__(self, run_dir: str | Path) -> None:
        self._file = Path(run_dir) / FILE
        self._told = False

    def tell(self, when: str, failed: int, count: int, error: str) -> None:
        """`failed` of a batch's `count` rewards failed, the first of them with `error`."""
        text = f"{when}: {failed} of {count} rewards failed; the first: {error}"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")
        if not self._told:
            _log.warning("%s\n(the first of later ones: %s)", text, self._file)
            self._told = True
