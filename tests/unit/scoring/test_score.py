"""Scoring in one process, against transformers' model with the same weights."""

from pathlib import Path

import pytest
import torch

from gspo_moe.model.weights import SafetensorsSource
from gspo_moe.scoring.score import score
from gspo_moe.types import TrainingSample
from tests.policy import packs_of
from tests.qwen3 import architecture, built, layout, random_sequences, reference_logits, reference_model

SIZES = architecture()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_packs_are_those_of_transformers_for_each_sequence(temperature: float, tmp_path: Path) -> None:
    reference = reference_model(SIZES)
    reference.save_pretrained(tmp_path)
    sequences = random_sequences(SIZES, (9, 2, 17, 5, 30), seed=6)
    samples = [TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1)) for ids in sequences]
    with built(SIZES, layout(), SafetensorsSource(tmp_path)) as model:
        found = torch.cat(score(model, packs_of(samples, per_pack=2), temperature=temperature))
    expected = [
        torch.log_softmax(logits[:-1].double() / temperature, dim=1).gather(1, ids[1:, None])[:, 0]
        for ids, logits in zip(sequences, reference_logits(reference, sequences), strict=True)
    ]
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=1e-4, rtol=0)
