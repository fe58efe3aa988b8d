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

    def __init__(self, run_dir: str | Path, main: bool, allow_all_failed: bool, max_failure_rate: float = 1.0) -> None:
        """main: this process writes and tells. allow_all_failed, max_failure_rate: as `task.reward` has them."""
        self._file = Path(run_dir) / FILE
        self._main, self._allow_all_failed, self._max_rate = main, allow_all_failed, max_failure_rate
        self._told = False

    def check(self, groups: Sequence[RolloutGroup], when: str) -> None:
        """Shows and keeps the first reward of these groups that failed.

        Raises RewardError where not one rollout got a reward of its own, unless that is allowed, and where a larger
        share than `max_failure_rate` did not.
        """
        rewards = [one.reward for group in groups for one in group.rollouts]
        errors = [reward.error for reward in rewards if reward is not None and reward.error is not None]
        if errors and self._main:
            self._tell(f"{when}: {len(errors)} of {len(rewards)} rewards failed; the first: {errors[0]}")
        if errors and len(errors) == len(rewards) and not self._allow_all_failed:
            raise RewardError(
                f"none of {len(rewards)} answers got a reward; the first: {self._last_line(errors[0])}; mend the "
                "reward, or set task.reward.allow_all_failed=true to go on with task.reward.failure_reward for all of "
                "them"
            )
        if len(errors) > self._max_rate * len(rewards):
            raise RewardError(
                f"{len(errors)} of {len(rewards)} rewards failed, a larger share than task.reward.max_failure_rate="
                f"{self._max_rate:g}; the first: {self._last_line(errors[0])}; mend the reward, or raise "
                "task.reward.max_failure_rate"
            )

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
