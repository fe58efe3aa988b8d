from __future__ import annotations

from dataclasses import fields, replace
from random import Random

import pytest
import torch

from gspo_moe.data.packing import pack, subset
from gspo_moe.errors import DataError
from gspo_moe.types import TrainingSample


def random_sample(random: Random, with_log_probs: bool) -> TrainingSample:
    """Prompt, response, and sometimes tool tokens and a second response."""
    mask = [0] * random.randint(1, 5) + [1] * random.randint(1, 6)
    if random.random() < 0.5:
        mask += [0] * random.randint(1, 3) + [1] * random.randint(1, 3)
    return TrainingSample(
        token_ids=tuple(random.randrange(1000) for _ in mask),
        response_mask=tuple(mask),
        advantage=random.gauss(0, 1),
        rollout_log_probs=tuple(-random.random() for _ in range(sum(mask))) if with_log_probs else (),
    )


@pytest.mark.parametrize("with_log_probs", [True, False])
def test_every_position_holds_what_a_slow_loop_says(with_log_probs: bool) -> None:
    random = Random(3)
    samples = [random_sample(random, with_log_probs) for _ in range(9)]
    chosen = [7, 0, 3, 8, 4]
    batch = pack(samples, chosen)
    position = 0
    for number, index in enumerate(chosen):
        sample = samples[index]
        assert batch.cu_seqlens[number] == position
        assert batch.advantages_N[number].item() == pytest.approx(sample.advantage, rel=1e-6)
        remaining = list(sample.rollout_log_probs)
        for token in range(len(sample.token_ids) - 1):
            assert batch.input_ids_T[position] == sample.token_ids[token]
            assert batch.target_ids_T[position] == sample.token_ids[token + 1]
            assert batch.position_ids_T[position] == token
            assert batch.route_mask_T[position].item() is (sample.response_mask[token] == 1)
            target_is_response = sample.response_mask[token + 1] == 1
            assert batch.response_mask_T[position] == float(target_is_response)
            log_prob = remaining.pop(0) if target_is_response and with_log_probs else 0.0
            assert batch.rollout_log_probs_T[position].item() == pytest.approx(log_prob, rel=1e-6)
            position += 1
        assert not remaining
    assert batch.cu_seqlens[-1] == position == batch.num_tokens
    assert batch.num_sequences == len(chosen)
    assert batch.sample_indices == tuple(chosen)


def test_the_types_are_those_of_a_microbatch() -> None:
    batch = pack([TrainingSample((1, 2, 3), (0, 1, 1))], [0])
    integers = (batch.input_ids_T, batch.target_ids_T, batch.position_ids_T, batch.cu_seqlens)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    floats = (batch.response_mask_T, batch.advantages_N, batch.rollout_log_probs_T)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert batch.route_mask_T.dtype == torch.bool


def test_the_last_sampled_token_is_a_target_and_never_an_input() -> None:
    batch = pack([TrainingSample((5, 6, 7, 8), (0, 0, 1, 1), rollout_log_probs=(-0.5, -0.25))], [0])
    assert batch.input_ids_T.tolist() == [5, 6, 7]
    assert batch.response_mask_T.tolist() == [0.0, 1.0, 1.0]
    assert batch.route_mask_T.tolist() == [False, False, True]
    assert batch.rollout_log_probs_T.tolist() == [0.0, -0.5, -0.25]


def test_a_version_stands_where_the_target_is_that_it_sampled() -> None:
    several = TrainingSample((5, 6, 7, 8, 9, 5), (0, 1, 1, 0, 1, 1), versions=((4, 1), (8, 2), (12, 1)))
    batch = pack([several, replace(several, versions=((0, 4),))], [0, 1])
    assert batch.versions_T is not None
    assert batch.versions_T.tolist() == [4, 8, -1, 8, 12, 0, 0, -1, 0, 0]
    assert pack([replace(several, versions=())], [0]).versions_T is None


GOOD = TrainingSample((1, 2, 3), (0, 1, 1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (TrainingSample((), ()), r"sample 2 has 0 token"),
        (TrainingSample((1,), (1,)), r"sample 2 has 1 token"),
        (replace(GOOD, response_mask=(0, 1)), r"sample 2 has 3 tokens and a response_mask of 2"),
        (replace(GOOD, response_mask=(0, 1, 2)), r"sample 2 .* among \[0, 1, 2\]"),
        (replace(GOOD, response_mask=(0, 0, 0)), r"sample 2 has no response token"),
        (replace(GOOD, response_mask=(1, 0, 0)), r"sample 2 has no response token after its first"),
        (replace(GOOD, rollout_log_probs=(-1.0,)), r"sample 2 has 1 rollout_log_probs for 2"),
        (replace(GOOD, rollout_log_probs=(-1.0,) * 3), r"sample 2 has 3 rollout_log_probs for 2"),
    ],
)
def test_a_bad_sample_is_named(bad: TrainingSample, message: str) -> None:
    samples = [GOOD, GOOD, bad]
    with pytest.raises(DataError, match=message):
        pack(samples, [1, 2])
    assert pack(samples, [1, 0]).num_sequences == 2


def with_routes(samples: list[TrainingSample], seed: int) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(sample.token_ids) - 1, 3, 2) for sample in samples]
    drawn = [torch.randint(0, 300, shape, dtype=torch.int16, generator=generator) for shape in shapes]
    return [replace(sample, routes=routes) for sample, routes in zip(samples, drawn, strict=True)]


def test_routes_lie_beside_their_inputs_and_must_fit() -> None:
    samples = with_routes([random_sample(Random(seed), True) for seed in range(4)], seed=1)
    batch = pack(samples, [2, 0])
    assert batch.routes_TAK is not None
    assert batch.routes_TAK.dtype == torch.int16
    assert torch.equal(batch.routes_TAK, torch.cat([samples[2].routes, samples[0].routes]))  # type: ignore[list-item]
    for wrong in (replace(samples[3], routes=None), replace(samples[3], routes=samples[3].routes[:-1])):  # type: ignore[index]
        with pytest.raises(DataError, match="sample 3 has routes of"):
            pack([*samples[:3], wrong], [1, 3])


def test_a_subset_of_a_pack_is_the_pack_of_those_samples() -> None:
    samples = with_routes([random_sample(Random(seed), True) for seed in range(6)], seed=2)
    whole = pack(samples, [5, 1, 4, 0])
    few, index_T = subset(whole, [1, 3])
    for field in fields(few):
        found, expected = (getattr(each, field.name) for each in (few, pack(samples, [1, 0])))
        assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected, field.name
    assert torch.equal(whole.input_ids_T[index_T], few.input_ids_T)
