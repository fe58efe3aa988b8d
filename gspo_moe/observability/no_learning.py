"""Says once that a run does not learn: where all answers to every prompt have the same reward, the gradient is 0."""

from __future__ import annotations

import logging

WARN_AT = (5, 50)  # steps in a row
_log = logging.getLogger(__name__)


class NoLearning:
    """Counts such steps in a row since this process started; main: this process tells."""

    def __init__(self, main: bool) -> None:
        self._main, self._steps = main, 0
        self._told = 0

    def step(self, groups: int, equal: int, mean_reward: float) -> None:
        """equal: how many of the step's groups have equal rewards. Warns at 5 steps without any other, and at 50."""
        self._steps = self._steps + 1 if groups and equal == groups else 0
        if not self._main or self._told == len(WARN_AT) or self._steps != WARN_AT[self._told]:
            return
        self._told += 1
        _log.warning(
            "for %d steps in a row all answers to every prompt have had the same reward (mean %.3g), so that nothing "
            "was learnt: look whether the reward is right (the answers are in the run's folder); take easier or harder "
            "prompts, train on demonstrations first (stage=sft), raise rollout.samples_per_prompt or "
            "rollout.temperature, or leave such groups out (algorithm.dynamic_sampling=true)",
            self._steps,
            mean_reward,
        )
