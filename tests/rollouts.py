"""Rollouts of one answer, as tests name their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gspo_moe.types import Prompt, Reward, Rollout, RolloutGroup, Turn


def rollout(
    uid: str,
    index: int,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    log_probs: Sequence[float] | None = None,
    finished: bool = True,
    version: int = 0,
    text: str | None = None,
    **more: Any,
) -> Rollout:
    return Rollout(
        uid=uid,
        sample_index=index,
        token_ids=(*prompt_ids, *response_ids),
        policy_mask=(0,) * len(prompt_ids) + (1,) * len(response_ids),
        log_probs=tuple(log_probs if log_probs is not None else (-1.0,) * len(response_ids)),
        finish="stop" if finished else "length",
        versions=((version, len(response_ids)),),
        turns=() if text is None else (Turn("policy", text),),
        **more,
    )


def rewarded(
    uid: str, rewards: Sequence[float], lengths: Sequence[int], finished: Sequence[bool], failed: int = 0
) -> RolloutGroup:
    """A group whose last `failed` rewards are none of their own."""
    errors = [None] * (len(rewards) - failed) + ["it broke"] * failed
    return RolloutGroup(
        Prompt(uid, "?", "t"),
        tuple(
            rollout(uid, number, (1,), (2,) * length, finished=done, reward=Reward(reward, error=error))
            for number, (reward, length, done, error) in enumerate(zip(rewards, lengths, finished, errors, strict=True))
        ),
    )
