from __future__ import annotations

import pytest

from gspo_moe.config import ConfigError, load_config


@pytest.mark.parametrize(
    ("name", "clips"), [("gspo", (3e-4, 4e-4)), ("gspo_token", (3e-4, 4e-4)), ("grpo", (0.2, 0.27))]
)
def test_clips_default_to_each_papers_own(name: str, clips: tuple[float, float]) -> None:
    assert load_config(None, [f"algorithm.name={name}"]).algorithm.clips == clips


@pytest.mark.parametrize("clip", ["clip_low", "clip_high"])
@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_wide_clips_of_a_sequence_ratio_need_consent(name: str, clip: str) -> None:
    wide = [f"algorithm.name={name}", f"algorithm.{clip}=0.01"]
    with pytest.raises(ConfigError, match="allow_wide_clip=true"):
        load_config(None, wide)
    assert 0.01 in load_config(None, [*wide, "algorithm.allow_wide_clip=true"]).algorithm.clips
    assert load_config(None, [f"algorithm.name={name}", f"algorithm.{clip}=0.0099"]).algorithm.name == name


def test_mini_batches_need_not_divide_for_supervised_training() -> None:
    overrides = ["rollout.prompts_per_step=10"]
    with pytest.raises(ConfigError, match=r"algorithm\.mini_batches=4"):
        load_config(None, overrides)
    assert load_config(None, [*overrides, "stage=sft"]).rollout.prompts_per_step == 10


def test_expert_tensor_follows_tensor_unless_set() -> None:
    assert load_config(None, ["parallel.tensor=2"]).parallel.expert_tensor_size == 2
    assert load_config(None, ["parallel={tensor: 2, expert_tensor: 1}"]).parallel.expert_tensor_size == 1
