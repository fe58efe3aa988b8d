"""Where context parallelism puts the tokens; sums over ranks are in tests/distributed/test_context.py."""

import pytest
import torch

from gspo_moe.parallel.context import context_rank, join_context, split_context

LENGTHS = (13, 1, 0, 8, 3, 16, 5)
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])


def zigzag(length: int, size: int) -> list[int]:
    """megatron-core's way: pad to 2 * size equal chunks of which rank r takes number r and its mirror image."""
    chunk = -(-length // (2 * size))
    owner = [0] * length
    for rank in range(size):
        for number in (rank, 2 * size - 1 - rank):
            for token in range(number * chunk, (number + 1) * chunk):
                if token < length:
                    owner[token] = rank
    return owner


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_each_sequence_is_dealt_in_zigzag_order(size: int) -> None:
    expected = [rank for length in LENGTHS for rank in zigzag(length, size)]
    assert context_rank(CU_SEQLENS, size).tolist() == expected


def test_sixteen_tokens_over_two_ranks_by_hand() -> None:
    assert context_rank(torch.tensor([0, 16]), 2).tolist() == [0] * 4 + [1] * 8 + [0] * 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_parts_keep_their_sequences_and_join_to_the_whole(size: int) -> None:
    values = torch.randn(sum(LENGTHS), 2, generator=torch.Generator().manual_seed(1))
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    parts = []
    for rank in range(size):
        tokens, bounds = split_context(CU_SEQLENS, size, rank)
        assert bounds.tolist() == [0, *torch.bincount(sequence[tokens], minlength=len(LENGTHS)).cumsum(0).tolist()]
        parts.append(values[tokens])
    assert torch.equal(join_context(parts, CU_SEQLENS), values)


def test_long_sequences_cost_every_rank_the_same_attention() -> None:
    offset = torch.arange(64, dtype=torch.float64)
    cost = [float((offset[split_context(torch.tensor([0, 64]), 4, rank)[0]] + 1).sum()) for rank in range(4)]
    assert cost == [64 * 65 / 2 / 4] * 4
