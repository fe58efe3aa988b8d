"""Which rows and positions have logits; every layout is in tests/distributed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gspo_moe.model.build import Model
from gspo_moe.model.weights import RandomSource
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.scoring.score import score
from gspo_moe.types import Rollout, TrainingSample
from tests.memory import memory_profile, peak_bytes
from tests.policy import LoudRows, as_sample, packs_of, requests, sampling
from tests.qwen3 import architecture, built, forward_logits, layout, logits_at, random_sequences

VOCAB = 61
SIZES = architecture(vocab_size=90, initializer_range=0.25)
HOT = 50.0


@pytest.fixture
def model() -> Iterator[Model]:
    """All rows are tokens, which the loud ones among them win."""
    with built(SIZES, layout(), LoudRows(SIZES, 2, VOCAB)) as model:
        yield model


def generate(model: Model, samples: int, temperature: float) -> list[Rollout]:
    groups = MegatronEngine(model, 64, 64).generate(requests(samples), sampling(temperature))
    return [rollout for group in groups for rollout in group]


@pytest.mark.parametrize("fused", [True, False])
def test_rows_without_a_token_are_never_sampled_and_have_no_probability(fused: bool, model: Model) -> None:
    assert max(token for rollout in generate(model, 1, 1.0) for token in rollout.response_ids) >= VOCAB
    policy = replace(model, vocab=VOCAB, fused_log_probs=fused)
    rollouts = generate(policy, 16, HOT)
    assert {token for rollout in rollouts for token in rollout.response_ids} == set(range(VOCAB))
    packs = packs_of([as_sample(rollout) for rollout in rollouts], per_pack=20)
    for pack, log_probs_T in zip(packs, score(policy, packs, temperature=HOT), strict=True):
        error_T = log_probs_T - pack.rollout_log_probs_T
        assert error_T[pack.response_mask_T.bool()].abs().max() < 2e-5
    (pack,) = packs_of([TrainingSample((7, token), (0, 1)) for token in range(VOCAB)], per_pack=VOCAB)
    (log_probs_T,) = score(policy, [pack])
    assert log_probs_T.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_chosen_positions_have_the_logits_of_a_whole_pack(model: Model) -> None:
    packs = [random_sequences(SIZES, lengths) for lengths in ((11, 4), (3,))]
    chosen: tuple[list[int], ...] = ([14, 10, 0], [])
    for found_NV, whole, positions in zip(
        logits_at(model, packs, chosen), forward_logits(model, packs), chosen, strict=True
    ):
        torch.testing.assert_close(found_NV, torch.cat(whole)[positions], atol=1e-5, rtol=1e-5)
    (again,) = forward_logits(model, packs[1:])
    assert torch.equal(again[0], whole[0])


def test_a_prefill_makes_the_logits_that_it_samples_from_and_no_others() -> None:
    sizes, length = architecture(vocab_size=16384, num_hidden_layers=1, max_position_embeddings=256), 240
    (prompt,) = random_sequences(sizes, [length])
    asked = requests(samples=1, prompts=[tuple(prompt.tolist())])
    with built(sizes, layout(), RandomSource(sizes, seed=2)) as model, memory_profile() as profile:
        MegatronEngine(model, 1, length).generate(asked, sampling(longest=2))
    every_logit = length * sizes.vocab_size * 4
    assert peak_bytes(profile) < every_logit / 4
