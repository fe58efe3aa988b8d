"""Group-relative advantages, arXiv 2402.03300 section 4.1.2.

Shape letters: N rollouts, G groups, S rollouts a group.
"""

from __future__ import annotations

import torch

from gspo_moe.errors import ConfigError, DataError

STD_EPSILON = 1e-6
LARGEST = 1e150  # squares of larger ones are infinite, and all advantages then 0


def group_advantages(rewards: torch.Tensor, group_size: int, *, scale: bool = True) -> torch.Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-6) within each prompt's group, std with ddof 1; exactly 0 for equal rewards.

    scale: False leaves the division out (2503.20783).
    rewards: floats [N], the rollouts of a prompt next to each other. Returns [N] in the rewards' dtype, computed in
    float64. Raises ConfigError for group_size < 2, DataError for rewards that do not fill groups, are not finite
    or are larger than 1e150.
    """
    rewards_GS = _groups(rewards, group_size)
    advantages_GS = rewards_GS - rewards_GS.mean(dim=1, keepdim=True)
    if scale:
        advantages_GS = advantages_GS / (rewards_GS.std(dim=1, correction=1, keepdim=True) + STD_EPSILON)
    # The mean of equal rewards may round away from them.
    advantages_GS = advantages_GS.masked_fill(_all_equal(rewards_GS)[:, None], 0.0)
    return advantages_GS.reshape(rewards.shape).to(rewards.dtype)


def degenerate_groups(rewards: torch.Tensor, group_size: int) -> int:
    """How many groups have equal rewards, hence no gradient; arguments and errors as for `group_advantages`."""
    return int(_all_equal(_groups(rewards, group_size)).sum())


def _all_equal(rewards_GS: torch.Tensor) -> torch.Tensor:
    return (rewards_GS == rewards_GS[:, :1]).all(dim=1)


def _groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    if group_size < 2:
        raise ConfigError(f"group_size={group_size}: a group needs 2 rollouts to compare; raise samples_per_prompt")
    if rewards.ndim != 1 or rewards.numel() % group_size or not rewards.is_floating_point():
        raise DataError(
            f"rewards must be floats [N] with N a multiple of group_size={group_size}, got {rewards.dtype} "
            f"{list(rewards.shape)}; give one reward for every rollout of every prompt"
        )
    fits = rewards.double().abs() <= LARGEST
    if not fits.all():
        index = int((~fits).nonzero()[0])
        raise DataError(
            f"reward {index} is {rewards[index].item()}, which is no number of at most {LARGEST:g} in size; let the "
            "reward function return finite numbers, or raise, which counts as a failure and gets failure_reward"
        )
    return rewards.double().reshape(-1, group_size)
