"""Samples under way: what has been sampled of a batch, on the device, and which row of the cache is whose.

Nothing here is done for each sample at each token: new tokens are written in one go, and the host learns where answers
ended from one list, whenever it asks.

Shape letters: S samples of the batch, N those not finished, one a row of the cache from the first, R response tokens at
most, W tokens since the last look, A MoE layers, L this stage's, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gspo_moe.errors import RolloutError
from gspo_moe.model.cache import KVCache
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.routing.recorder import RoutePass
from gspo_moe.types import Rollout


@dataclass(frozen=True)
class Sample:
    """One answer to a request, which is the `source`th of the batch, and the batch's `index`th request overall."""

    index: int
    source: int
    request: Request
    sample_index: int

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)


class Samples:
    """The batch's answers; `tokens` of them so far are the same number for all that are not finished.

    broken: whether a log-prob was not finite, which ends its sample.
    """

    def __init__(self, samples: Sequence[Sample], params: SamplingParams, place: torch.device) -> None:
        count, most = len(samples), params.max_response_tokens
        self.all = tuple(samples)
        self.tokens = 0
        self.broken = False
        self._params = params
        self._place = place
        self._stop_ids = torch.tensor(sorted(params.stop_ids), dtype=torch.int64, device=place)
        self._ids_SR = torch.zeros(count, most, dtype=torch.int64, device=place)
        self._log_probs_SR = torch.zeros(count, most, dtype=torch.float32, device=place)
        self._routes_SRLK: torch.Tensor | None = None
        self._lengths = [most] * count
        self._stopped = [False] * count
        self._host_ids = [list[int]() for _ in samples]  # for stop strings alone
        self._seen = 0
        self._numbers = list(range(count))
        self.numbers_N = torch.arange(count, device=place)
        last = [one.prompt_length - 1 for one in samples]
        self.positions_N = torch.tensor(last, dtype=torch.int64, device=place)

    @property
    def active(self) -> int:
        return len(self._numbers)

    @property
    def used(self) -> int:
        """Positions of the cache that the newest tokens, once fed, take at most."""
        return max((self.all[number].prompt_length for number in self._numbers), default=0) + self.tokens

    @property
    def newest_N(self) -> torch.Tensor:
        """Of each active sample, int64; `positions_N` are theirs."""
        return self._ids_SR[self.numbers_N, self.tokens - 1]

    def append(self, ids_N: torch.Tensor, log_probs_N: torch.Tensor) -> None:
        """One more token of each active sample."""
        self._ids_SR[self.numbers_N, self.tokens] = ids_N
        self._log_probs_SR[self.numbers_N, self.tokens] = log_probs_N
        self.positions_N += 1
        self.tokens += 1

    def keep_routes(self, routes_NLK: torch.Tensor) -> None:
        """Of the newest tokens, once they were fed."""
        kept_SRLK, (count, most) = self._routes_SRLK, self._ids_SR.shape
        if kept_SRLK is None or kept_SRLK.shape[1] < self.tokens:  # most answers end long before the limit
            more_SRLK = routes_NLK.new_zeros(count, min(most, max(2 * self.tokens, 64)), *routes_NLK.shape[1:])
            if kept_SRLK is not None:
                more_SRLK[:, : kept_SRLK.shape[1]] = kept_SRLK
            self._routes_SRLK = kept_SRLK = more_SRLK
        kept_SRLK[self.numbers_N, self.tokens - 1] = routes_NLK

    def retire(self, cache: KVCache) -> list[int]:
        """Looks at the tokens since the last look; what has ended leaves, the last rows' samples take the rows.

        Returns the numbers of those that left.
        """
        ends = self._ends()
        staying = [row for row, end in enumerate(ends) if not end]
        left = [number for number, end in zip(self._numbers, ends, strict=True) if end]
        for number, end in zip(left, filter(None, ends), strict=True):
            self._lengths[number], self._stopped[number] = end, True
        self._seen = self.tokens
        if not left:
            return left
        used = self.used - 1
        free = [row for row in range(len(staying)) if ends[row]]
        moving = [row for row in staying if row >= len(staying)]
        if moving:
            cache.copy(moving, free, used)
        moved = dict(zip(free, moving, strict=True))
        rows = [moved.get(row, row) for row in range(len(staying))]
        self._numbers = [self._numbers[row] for row in rows]
        kept = torch.tensor(rows, dtype=torch.int64, device=self._place)
        self.numbers_N, self.positions_N = self.numbers_N[kept], self.positions_N[kept]
        return left

    def unstopped(self) -> list[int]:
        """Numbers of the samples that nothing but the length limit has ended, or will."""
        return [number for number, stopped in enumerate(self._stopped) if not stopped]

    def rollout(self, number: int, version: int) -> Rollout:
        """One sample that has ended, without its routes."""
        length = self._lengths[number]
        ids, log_probs = self._ids_SR[number, :length].tolist(), self._log_probs_SR[number, :length].tolist()
        return self._rollout(number, version, ids, log_probs)

    def rollouts(self, version: int, routes: Sequence[torch.Tensor] | None) -> list[Rollout]:
        """All samples, in order; routes: of every token but the last, [T, A, K] each."""
        ids, log_probs = self._ids_SR.tolist(), self._log_probs_SR.tolist()
        found = [
            self._rollout(number, version, ids[number][:length], log_probs[number][:length])
            for number, length in enumerate(self._lengths)
        ]
        return found if routes is None else [replace(one, routes=own) for one, own in zip(found, routes, strict=True)]

    def _rollout(self, number: int, version: int, ids: list[int], log_probs: list[float]) -> Rollout:
        one = self.all[number]
        return Rollout(
            uid=one.request.uid,
            sample_index=one.sample_index,
            token_ids=(*one.request.prompt_ids, *ids),
            policy_mask=(0,) * one.prompt_length + (1,) * len(ids),
            log_probs=tuple(log_probs),
            finish="stop" if self._stopped[number] else "length",
            versions=((version, len(ids)),),
        )

    def fed_routes(self) -> list[torch.Tensor]:
        """Of each sample's response tokens but the last, [length - 1, L, K]; none of them where none was fed."""
        if self._routes_SRLK is None:
            return []
        return [self._routes_SRLK[n, : length - 1] for n, length in enumerate(self._lengths)]

    def _ends(self) -> list[int]:
        """How long each active sample that has ended since the last look is, 0 of one that has not."""
        if not self._numbers:
            return []
        new = slice(self._seen, self.tokens)
        ids_NW, log_probs_NW = self._ids_SR[self.numbers_N, new], self._log_probs_SR[self.numbers_N, new]
        broken_NW = ~log_probs_NW.isfinite()
        stop_NW = torch.isin(ids_NW, self._stop_ids) | broken_NW
        ends_N = torch.where(stop_NW.any(1), stop_NW.int().argmax(1) + self._seen + 1, 0)
        found: list[list[int]] = torch.stack([ends_N, broken_NW.any(1).long(), *ids_NW.T]).tolist()
        ends, broken, *columns = found
        self.broken = self.broken or any(broken)
        if self._params.stop_strings is not None:
            rows = zip(self._numbers, ends, zip(*columns, strict=True), strict=True)
            ends = [self._earlier(number, end, new_ids) for number, end, new_ids in rows]
        return ends

    def _earlier(self, number: int, end: int, new_ids: Sequence[int]) -> int:
        """Where the sample ends if a stop string in its new tokens ends it before `end` (0: nothing has)."""
        strings, ids = self._params.stop_strings, self._host_ids[number]
        assert strings is not None
        for new in new_ids:
            ids.append(new)
            if len(ids) == end or strings.ended(ids):
                return len(ids)
        return 0


def misfit(requests: Sequence[Request], params: SamplingParams, positions: int, room: int) -> RolloutError | None:
    """What is wrong with the first of these requests that has no answer; room: tokens that a prefill pack takes."""
    for request in requests:
        length = len(request.prompt_ids)
        if not length:
            return RolloutError(f"prompt {request.uid} is empty; give at least one token")
        if length + params.max_response_tokens > positions:
            return RolloutError(
                f"prompt {request.uid} has {length} tokens and rollout.max_response_tokens is "
                f"{params.max_response_tokens}, more than the model's {positions} positions; lower one of them"
            )
        if length > room:
            return RolloutError(
                f"prompt {request.uid} has {length} tokens, more than schedule.micro_batch_tokens={room}; raise it"
            )
    return None


def in_batches(requests: Sequence[Request], most: int) -> list[list[tuple[int, Request, range]]]:
    """Requests in order, cut into batches of at most `most` samples; a request may span batches."""
    batches: list[list[tuple[int, Request, range]]] = [[]]
    free = most
    for index, request in enumerate(requests):
        start = 0
        while start < request.samples:
            if not free:
                batches.append([])
                free = most
            stop = min(request.samples, start + free)
            batches[-1].append((index, request, range(start, stop)))
            free -= stop - start
            start = stop
    return batches


def in_packs(requests: Sequence[Request], most: int) -> list[list[int]]:
    """The places of requests, in order, cut into packs of at most `most` tokens of prompts; one at least."""
    packs: list[list[int]] = [[]]
    room = most
    for place, request in enumerate(requests):
        if len(request.prompt_ids) > room:
            packs.append([])
            room = most
        packs[-1].append(place)
        room -= len(request.prompt_ids)
    return packs


def cut_routes(record: RoutePass | None, lengths: Sequence[int]) -> list[torch.Tensor]:
    """This stage's routes of a pass, cut into pieces of these lengths; none unless it was recorded."""
    packs = [] if record is None else record.recordings()
    return list(torch.cat([pack.routes_TLK for pack in packs]).split(list(lengths))) if packs and lengths else []
