"""Log-probs from hidden states, with and without room for all logits, against those from the output layer's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.schema import Config
from gspo_moe.scoring.score import score
from gspo_moe.types import TrainingSample
from tests.policy import packs_of, trained
from tests.qwen3 import architecture, layout, random_sequences
from tests.steps import train_minibatch, train_supervised

LENGTHS = (9, 14, 2, 11)


def outcome(tied: bool, dtype: str, fused: bool, budget: int | None = None) -> dict[str, Any]:
    """Log-probs, figures and change of all weights of one policy step and one supervised one."""
    sizes = architecture(initializer_range=0.25, tie_word_embeddings=tied)
    samples = [
        TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1), advantage=(-1.0) ** number)
        for number, ids in enumerate(random_sequences(sizes, LENGTHS, seed=8))
    ]
    packs = packs_of(samples, per_pack=2)
    config = Config.model_validate(
        {"model": {"preset": "tiny", "dtype": dtype, "fused_log_probs": fused}, "optimizer": {"lr": 1.0, "eps": 1.0}}
    )
    with trained(config, layout(), sizes) as (model, optimizer):
        assert model.fused_log_probs == fused
        model.log_prob_memory = model.log_prob_memory if budget is None else budget
        log_probs = score(model, packs, temperature=0.8)
        before = torch.cat([parameter.detach().flatten().clone() for parameter in model.chunks[0].parameters()])
        old = [values_T - 1e-4 * torch.arange(len(values_T)) for values_T in log_probs]
        result = train_minibatch(model, optimizer, packs, old, AlgorithmConfig(), len(samples), 0.8, None)
        learnt, update = train_supervised(model, optimizer, packs, num_tokens=30)
        after = torch.cat([parameter.detach().flatten() for parameter in model.chunks[0].parameters()])
    figures = {**result.statistics.to_metrics(), **learnt.to_metrics()}
    norms = [result.update.grad_norm, update.grad_norm]
    return {"log_probs": torch.cat(log_probs), "figures": figures, "norms": norms, "change": after - before}


@pytest.mark.parametrize(
    # Weights in bf16 round each step's change, and the second step starts from them.
    ("tied", "dtype", "error"),
    [(False, "fp32", 1e-5), (True, "fp32", 1e-5), (True, "bf16", 0.1)],
)
def test_policy_and_supervised_steps_are_those_from_logits(tied: bool, dtype: str, error: float) -> None:
    expected = outcome(tied, dtype, fused=False)
    for budget in (None, 1):  # all logits at once, and one token at a time
        found = outcome(tied, dtype, True, budget)
        torch.testing.assert_close(found["log_probs"], expected["log_probs"], atol=error, rtol=0)
        assert found["figures"] == pytest.approx(expected["figures"], rel=error, abs=error)
        assert found["norms"] == pytest.approx(expected["norms"], rel=error)
        assert (found["change"] - expected["change"]).norm() <= error * expected["change"].norm()
