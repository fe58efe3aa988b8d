from __future__ import annotations

from random import Random

import pytest

from gspo_moe.data.schedule import default_work, plan_microbatches, split_mini_batches
from gspo_moe.errors import ConfigError, DataError

Plan = list[list[list[int]]]


def assert_sound(plan: Plan, lengths: list[int], num_ranks: int, budget: int) -> None:
    micro_batches = [members for rank in plan for members in rank]
    assert sorted(index for members in micro_batches for index in members) == list(range(len(lengths)))
    assert all(members == sorted(members) and members for members in micro_batches)
    assert max(sum(lengths[index] for index in members) for members in micro_batches) <= budget
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1


def rank_work(plan: Plan, lengths: list[int]) -> list[float]:
    return [sum(default_work(lengths[index]) for members in rank for index in members) for rank in plan]


@pytest.mark.parametrize("seed", range(300))
def test_the_invariants_hold_for_random_mini_batches(seed: int) -> None:
    random = Random(seed)
    num_ranks = random.choice([1, 2, 3, 4, 8])
    longest = random.choice([3, 40, 1000])
    lengths = [random.randint(1, longest) for _ in range(num_ranks * random.randint(1, 12))]
    budget = random.randint(max(lengths), 4 * max(lengths))
    plan = plan_microbatches(lengths, num_ranks, budget)
    assert_sound(plan, lengths, num_ranks, budget)
    assert plan == plan_microbatches(tuple(lengths), num_ranks, budget)


@pytest.mark.parametrize("seed", range(100))
def test_any_number_of_sequences_gives_a_sound_plan_or_an_error(seed: int) -> None:
    random = Random(seed)
    num_ranks = random.randint(2, 5)
    lengths = [random.randint(1, 30) for _ in range(random.randint(num_ranks, 40))]
    budget = random.randint(30, 60)
    try:
        plan = plan_microbatches(lengths, num_ranks, budget)
    except DataError:
        # Without room for sequences to share, a number of them that does not divide cannot work out.
        assert len(lengths) % num_ranks
        return
    assert_sound(plan, lengths, num_ranks, budget)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_and_rounds_carry_nearly_equal_work(num_ranks: int) -> None:
    random = Random(num_ranks)
    lengths = [min(4000, int(random.lognormvariate(6, 1)) + 1) for _ in range(64 * num_ranks)]
    plan = plan_microbatches(lengths, num_ranks, token_budget=8192)
    work = rank_work(plan, lengths)
    assert max(work) < 1.02 * sum(work) / num_ranks
    rounds = zip(*plan, strict=True)
    for members_of_round in rounds:
        loads = [sum(default_work(lengths[index]) for index in members) for members in members_of_round]
        assert max(loads) < 1.1 * min(loads)


def test_no_more_micro_batches_than_needed() -> None:
    assert plan_microbatches([4] * 8, num_ranks=2, token_budget=16) == [[[1, 3, 5, 7]], [[0, 2, 4, 6]]]
    assert [len(rank) for rank in plan_microbatches([4] * 8, num_ranks=2, token_budget=15)] == [2, 2]
    assert [len(rank) for rank in plan_microbatches([4] * 8, num_ranks=2, token_budget=4)] == [4, 4]


def test_the_default_work_grows_faster_than_length() -> None:
    assert default_work(16_384) == 2 * 16_384
    assert default_work(2000) > 2 * default_work(1000)


def test_another_work_estimate_changes_who_gets_what() -> None:
    lengths = [10, 6, 5, 5]
    linear = plan_microbatches(lengths, 2, 100, work=float)
    cubic = plan_microbatches(lengths, 2, 100, work=lambda tokens: float(tokens**3))
    assert sorted(sum(lengths[index] for index in rank[0]) for rank in linear) == [11, 15]
    assert sorted(sum(lengths[index] for index in rank[0]) for rank in cubic) == [10, 16]


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "budget", "message"),
    [
        ([5, 17, 3], 1, 16, r"sequence 1 has 17 tokens, .*micro_batch_tokens=16; raise that to at least 17"),
        ([5], 2, 16, r"1 sequences cannot keep 2 .*rollout\.prompts_per_step"),
        ([], 1, 16, r"0 sequences cannot keep 1"),
        ([8, 8, 8], 2, 10, r"3 sequences of 24 tokens do not fit .*micro_batch_tokens=10.*multiple of 2"),
    ],
)
def test_what_cannot_be_planned_names_the_fix(lengths: list[int], num_ranks: int, budget: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_microbatches(lengths, num_ranks, budget)


def test_mini_batches_are_contiguous_whole_groups() -> None:
    assert split_mini_batches(4, 3, 2) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert split_mini_batches(3, 2, 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ConfigError, match=r"5 groups .*algorithm\.mini_batches=2"):
        split_mini_batches(5, 2, 2)
