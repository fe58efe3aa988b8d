"""Who trains on what: sequences into micro-batches, micro-batches onto data-parallel ranks.

Strategy: pack first, distribute second.
1. For m = 1, 2, ... micro-batches a rank, from the least that the token budget allows, place the sequences in
   ranks x m bins, longest first, each into the bin with the least work that has room for it (greedy longest processing
   time). The first m for which all find room is taken.
2. Sort the bins by work. Each run of `ranks` neighbours becomes one round of micro-batches, one for each rank, so that
   ranks which meet in an expert all-to-all carry about equal loads; within a round the heaviest bin goes to the rank
   with the least work so far.

Invariants, which the tests hold:
- every sequence is in exactly one micro-batch;
- no micro-batch exceeds the budget, and none is empty;
- every rank has the same number of micro-batches (the pipeline schedule and the collectives need it);
- the plan depends on the arguments alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from gspo_moe.errors import ConfigError, DataError

# Where causal attention costs as much as all the rest of Qwen3-30B-A3B (3.3e9 active parameters: 6.6e9 FLOP a token
# forward; attention over n tokens: 48 layers x 2 n x 32 heads x 128 = 393e3 n). A tie-breaker elsewhere.
ATTENTION_EQUALS_REST_TOKENS = 16_384

Work = Callable[[int], float]


def default_work(tokens: int) -> float:
    """Cost of a sequence in units of one token's dense work: n + n^2 / 16384, the square being causal attention."""
    return tokens + tokens * tokens / ATTENTION_EQUALS_REST_TOKENS


def plan_microbatches(
    lengths: Sequence[int], num_ranks: int, token_budget: int, work: Work | None = None, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Plans one mini-batch: `plan[rank][micro_batch]` is a list of indices into `lengths`, ascending.

    lengths: tokens each sequence takes in a pack, at least 1 (one less than its token ids).
    token_budget: most tokens a micro-batch may hold.
    work: cost of a sequence of that length, positive and growing; `default_work` unless given.
    multiple_of: what divides the number of micro-batches (the pipeline size, under virtual pipelining).
    Raises DataError when a sequence exceeds the budget, when there are fewer sequences than ranks, and when no count
    of micro-batches works out.
    """
    assert num_ranks > 0
    assert all(length > 0 for length in lengths)
    if len(lengths) < num_ranks:
        raise DataError(
            f"{len(lengths)} sequences cannot keep {num_ranks} data-parallel ranks busy; raise "
            "rollout.prompts_per_step (or schedule.sft_batch), or lower algorithm.mini_batches"
        )
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > token_budget:
        raise DataError(
            f"sequence {longest} has {lengths[longest]} tokens, more than schedule.micro_batch_tokens={token_budget}; "
            f"raise that to at least {lengths[longest]}"
        )
    costs = [(work or default_work)(length) for length in lengths]
    fewest = -(-sum(lengths) // (token_budget * num_ranks))
    for count in range(fewest + -fewest % multiple_of, len(lengths) // num_ranks + 1, multiple_of):
        bins = _fill(lengths, costs, count * num_ranks, token_budget)
        if bins is not None:
            return _distribute(bins, costs, num_ranks)
    raise DataError(
        f"{len(lengths)} sequences of {sum(lengths)} tokens do not fit {num_ranks} data-parallel ranks in equally many "
        f"micro-batches each; raise schedule.micro_batch_tokens={token_budget}, or make the number of sequences "
        f"(rollout.prompts_per_step, schedule.sft_batch) a multiple of {num_ranks}"
    )


def split_mini_batches(num_groups: int, group_size: int, mini_batches: int) -> list[list[int]]:
    """Sample indices of each mini-batch: contiguous, whole groups, equally many in each.

    Samples are numbered group by group. Raises ConfigError when the groups do not divide.
    """
    if num_groups % mini_batches:
        raise ConfigError(
            f"{num_groups} groups do not divide into algorithm.mini_batches={mini_batches}; "
            "make rollout.prompts_per_step a multiple of it"
        )
    size = num_groups // mini_batches * group_size
    return [list(range(start, start + size)) for start in range(0, num_groups * group_size, size)]


def _fill(lengths: Sequence[int], costs: Sequence[float], num_bins: int, budget: int) -> list[list[int]] | None:
    """Bins by longest processing time, or None where a sequence finds no room; no bin is empty if there are enough."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [budget] * num_bins
    by_work = [(0.0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = []
        while by_work and room[by_work[0][1]] < lengths[index]:
            full.append(heapq.heappop(by_work))
        if not by_work:
            return None
        cost, number = by_work[0]
        heapq.heapreplace(by_work, (cost + costs[index], number))
        bins[number].append(index)
        room[number] -= lengths[index]
        for entry in full:
            heapq.heappush(by_work, entry)
    return bins


def _distribute(bins: list[list[int]], costs: Sequence[float], num_ranks: int) -> list[list[list[int]]]:
    weighted = sorted(((sum(costs[index] for index in members), sorted(members)) for members in bins), reverse=True)
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(weighted), num_ranks):
        lightest_first = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, (cost, members) in zip(lightest_first, weighted[start : start + num_ranks], strict=True):
            plan[rank].append(members)
            totals[rank] += cost
    return plan
