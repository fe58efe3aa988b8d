"""Where context parallelism puts the tokens; sums over ranks are in tests/distributed/test_context.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_moe.parallel.context import ContextSplit, context_rank, join_context, split_context

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


@pytest.mark.parametrize(("size", "padding"), [(2, 0), (2, 3), (4, 1)])
def test_each_token_sees_its_sequence_up_to_itself_and_nothing_else(size: int, padding: int) -> None:
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    groups: list[Any] = [SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank) for rank in range(size)]
    splits = [ContextSplit(CU_SEQLENS, group) for group in groups]
    padded = max(split.num_local for split in splits) + padding
    # What each place of the gathered ranks holds; -1 is padding.
    holds = torch.full((size, padded), -1)
    for rank, split in enumerate(splits):
        holds[rank, : split.num_local] = split.tokens_C
    for rank, split in enumerate(splits):
        queries, keys, places = split.visible_keys(padded)
        assert queries[-1] == padded
        for start, stop, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
            for number, query in enumerate(holds[rank, start:stop].tolist(), start=int(start)):
                seen = places[first : last - (int(stop) - 1 - number)]
                if query < 0:
                    assert set((seen // padded).tolist()) == {rank}
                    assert (holds.flatten()[seen] == -1).all()
                else:
                    begin = int(CU_SEQLENS[sequence[query]])
                    assert holds.flatten()[seen].tolist() == list(range(begin, query + 1))


def test_a_long_sequences_keys_are_gathered_little_more_than_once() -> None:
    for rank in range(4):
        group: Any = SimpleNamespace(size=lambda: 4, rank=lambda rank=rank: rank)
        _, keys, _ = ContextSplit(torch.tensor([0, 64]), group).visible_keys(16)
        assert keys[-1] == (40 if rank == 3 else 64 + 8)  # the last rank's two chunks are one stretch in the middle
