"""What went wrong with rewards, for the user to see: the first at once, and every batch's first in the run's folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from gspo_moe.errors import RewardError
from gspo_moe.types import RolloutGroup

FILE = "reward_errors.txt"
_log = logging.getLogger(__name__)


def first_reward_error(run_dir: str | Path) -> str | None:
    """What a run wrote first, to its first empty line; None where no reward has failed."""
    file = Path(run_dir) / FILE
    text, end, _ = file.read_text(encoding="utf-8").partition("\n\n") if file.is_file() else ("", "", "")
    return text if end else None


class RewardErrors:
    """Appends to `run_dir`/reward_errors.txt; also what an attempt writes that a resumed run repeats stays there."""

    def __init__(
        self,
        run_dir: str | Path,
        main: bool,
        allow_all_failed: bool,
        max_failure_rate: float = 1.0,
        max_failed_batches: int = 10,
    ) -> None:
        """main: this process writes and tells. The others: as `task.reward` has them."""
        self._file = Path(run_dir) / FILE
        self._main, self._max_rate = main, max_failure_rate
        self._most_in_a_row = max_failed_batches if allow_all_failed else 1
        self._told, self._in_a_row = False, 0

    def check(self, groups: Sequence[RolloutGroup], when: str) -> None:
        """Shows and keeps the first reward of these groups that failed.

        Raises RewardError where not one rollout got a reward of its own, where that is allowed once it has happened
        `max_failed_batches` times in a row, and where a larger share than `max_failure_rate` did not.
        """
        rewards = [one.reward for group in groups for one in group.rollouts]
        errors = [reward.error for reward in rewards if reward is not None and reward.error is not None]
        if errors and self._main:
            self._tell(f"{when}: {len(errors)} of {len(rewards)} rewards failed; the first: {errors[0]}")
        self._in_a_row = self._in_a_row + 1 if errors and len(errors) == len(rewards) else 0
        if self._in_a_row:
            self._all_failed(len(rewards), errors[0], when)
        if len(errors) > self._max_rate * len(rewards):
            raise RewardError(
                f"{len(errors)} of {len(rewards)} rewards failed, a larger share than task.reward.max_failure_rate="
                f"{self._max_rate:g}; the first: {self._last_line(errors[0])}; mend the reward, or raise "
                "task.reward.max_failure_rate"
            )

    def _all_failed(self, count: int, error: str, when: str) -> None:
        found = f"none of {count} answers got a reward"
        if self._in_a_row < self._most_in_a_row:
            if self._main:
                left = self._most_in_a_row - self._in_a_row
                _log.warning("%s: %s; the run ends where %d batches more in a row have none", when, found, left)
            return
        fix = "set task.reward.allow_all_failed=true to go on with task.reward.failure_reward for all of them"
        if self._most_in_a_row > 1:
            found += f", as in {self._in_a_row} batches in a row (task.reward.max_failed_batches)"
            fix = "raise that limit"
        raise RewardError(f"{found}; the first: {self._last_line(error)}; mend the reward, or {fix}")

    def _last_line(self, error: str) -> str:
        """Of a stack trace what it ends with, and where all of it stands."""
        *before, last = error.splitlines()
        return f"{last} (in whole: {self._file})" if before else last

    def _tell(self, text: str) -> None:
        text = text.encode(errors="backslashreplace").decode()  # lone surrogates, which no file and no terminal takes
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(re.sub(r"\n\s*\n", "\n", text) + "\n\n")  # an empty line ends an entry
        except OSError as error:
            _log.warning("%s cannot be written (%s):\n%s", self._file, error.strerror, text)
            return
        if not self._told:
            _log.warning("%s\n(the first of later ones: %s)", text, self._file)
            self._told = True
