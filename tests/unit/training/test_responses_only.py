"""The output layer on response tokens alone: figures and update are those of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.schema import Config
from gspo_moe.model.inputs import response_positions
from gspo_moe.parallel.context import ContextSplit
from gspo_moe.scoring.score import score
from gspo_moe.training import step
from gspo_moe.types import Microbatch, TrainingSample
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import layout, random_sequences
from tests.steps import train_minibatch, train_supervised

LENGTHS = (9, 14, 5, 11, 21)


def samples(response: int) -> list[TrainingSample]:
    """Sequences of a prompt and `response` tokens at their end, the longer ones with a turn between."""
    found = []
    for number, ids in enumerate(random_sequences(SIZES, LENGTHS, seed=8)):
        mask = [0] * (len(ids) - response) + [1] * response
        if len(ids) > 12 and response > 1:
            mask[2:4] = [1, 1]
        found.append(TrainingSample(tuple(ids.tolist()), tuple(mask), advantage=(-1.0) ** number * (1 + number / 7)))
    return found


def everywhere(microbatch: Microbatch, split: ContextSplit) -> torch.Tensor:
    return torch.arange(split.num_local)


def outcome(config: Config, everything: bool, response: int = 3, **parallel: Any) -> dict[str, Any]:
    """Log-probs of responses, figures and change of all weights of one policy step and one supervised one."""
    with pytest.MonkeyPatch.context() as patch, trained(config, layout(**parallel)) as (model, optimizer):
        if everything:
            patch.setattr(step, "response_positions", everywhere)
        packs = packs_of(samples(response), per_pack=2)
        log_probs = score(model, packs, temperature=0.8, responses_only=not everything)
        old = [values_T - 1e-3 * torch.arange(len(values_T)) for values_T in log_probs]
        before = torch.cat([one.detach().flatten().clone() for one in model.chunks[0].parameters()])
        algorithm = AlgorithmConfig.model_validate({"name": "grpo", "clip_low": 0.01, "clip_high": 0.01})
        result = train_minibatch(model, optimizer, packs, old, algorithm, len(LENGTHS), 0.8, None)
        learnt, update = train_supervised(model, optimizer, packs, num_tokens=30)
        after = torch.cat([one.detach().flatten() for one in model.chunks[0].parameters()])
        masked = [values_T * pack.response_mask_T for values_T, pack in zip(log_probs, packs, strict=True)]
        if not everything:
            assert all(map(torch.equal, masked, log_probs))
            some = response_positions(packs[0], ContextSplit(packs[0].cu_seqlens))
            assert len(some) == packs[0].response_mask_T.sum() < packs[0].num_tokens
    figures = {**result.statistics.to_metrics(), **learnt.to_metrics()}
    norms = [result.update.grad_norm, update.grad_norm]
    return {"log_probs": torch.cat(masked), "figures": figures, "norms": norms, "change": after - before}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["log_probs"], expected["log_probs"], atol=1e-5, rtol=0)
    assert found["figures"] == pytest.approx(expected["figures"], rel=1e-5, abs=1e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert (found["change"] - expected["change"]).norm() <= 1e-5 * expected["change"].norm()


def smooth(fused: bool) -> Config:
    model = {"preset": "tiny", "fused_log_probs": fused}
    return Config.model_validate({"model": model, "optimizer": {"lr": 1.0, "eps": 1.0}})


@pytest.mark.parametrize("fused", [True, False])
def test_other_tokens_take_no_part(fused: bool) -> None:
    compare(outcome(smooth(fused), everything=False), outcome(smooth(fused), everything=True))
