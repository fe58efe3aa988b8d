"""Samples packed end to end into a micro-batch. Shape letters: T tokens of a pack, N sequences of a pack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import accumulate, chain
from typing import Any

import torch

from gspo_moe.errors import DataError
from gspo_moe.types import Microbatch, TrainingSample


def pack(samples: Sequence[TrainingSample], sample_indices: Sequence[int]) -> Microbatch:
    """Packs those of a mini-batch's `samples` that `sample_indices` names, in that order.

    A sample of n tokens takes n - 1 positions: inputs are its first n - 1 tokens, targets its last n - 1. The tensors
    (on the CPU) are as `Microbatch` describes them. Raises DataError, naming the sample, for fewer than two tokens, a
    mask that does not fit, no response token among the targets, and a wrong number of rollout log-probs or routes.
    """
    chosen = [samples[index] for index in sample_indices]
    for index, sample in zip(sample_indices, chosen, strict=True):
        _check(sample, index)
    lengths = [len(sample.token_ids) - 1 for sample in chosen]
    response_mask_T = _flat((sample.response_mask[1:] for sample in chosen), torch.float32)
    return Microbatch(
        input_ids_T=_flat((sample.token_ids[:-1] for sample in chosen), torch.int64),
        target_ids_T=_flat((sample.token_ids[1:] for sample in chosen), torch.int64),
        position_ids_T=_flat((range(length) for length in lengths), torch.int64),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int64),
        response_mask_T=response_mask_T,
        response_positions_M=response_mask_T.nonzero()[:, 0],
        route_mask_T=_flat((sample.response_mask[:-1] for sample in chosen), torch.bool),
        advantages_N=torch.tensor([sample.advantage for sample in chosen], dtype=torch.float32),
        rewards_N=torch.tensor([sample.reward for sample in chosen], dtype=torch.float32),
        rollout_log_probs_T=_flat((_by_token(sample)[1:] for sample in chosen), torch.float32),
        sample_indices=tuple(sample_indices),
        routes_TAK=_routes(chosen, sample_indices),
        versions_T=_versions(chosen),
    )


def subset(pack: Microbatch, sequences: Sequence[int]) -> tuple[Microbatch, torch.Tensor]:
    """A pack of these of `pack`'s sequences, in that order, and where in T its tokens were, int64.

    sequences: positions in the pack, at least one.
    """
    bounds = pack.cu_seqlens.tolist()
    device = pack.cu_seqlens.device
    index_T = torch.cat([torch.arange(bounds[i], bounds[i + 1], device=device) for i in sequences])
    lengths = [bounds[i + 1] - bounds[i] for i in sequences]
    by_token = {f.name: getattr(pack, f.name) for f in fields(pack) if f.name.endswith(("_T", "_TAK"))}
    chosen: dict[str, Any] = {name: values[index_T] for name, values in by_token.items() if values is not None}
    few = replace(
        pack,
        **chosen,
        response_positions_M=chosen["response_mask_T"].nonzero()[:, 0],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device=device),
        advantages_N=pack.advantages_N[torch.tensor(sequences, device=device)],
        rewards_N=pack.rewards_N[torch.tensor(sequences, device=device)],
        sample_indices=tuple(pack.sample_indices[i] for i in sequences),
    )
    return few, index_T


def _routes(chosen: Sequence[TrainingSample], sample_indices: Sequence[int]) -> torch.Tensor | None:
    pieces = [sample.routes for sample in chosen if sample.routes is not None]
    if not pieces:
        return None
    for index, sample in zip(sample_indices, chosen, strict=True):
        if sample.routes is None or len(sample.routes) != len(sample.token_ids) - 1:
            raise DataError(
                f"sample {index} has routes of {0 if sample.routes is None else len(sample.routes)} tokens and "
                f"{len(sample.token_ids)} tokens; give one row for each token but the last"
            )
    return torch.cat(pieces)


def _versions(chosen: Sequence[TrainingSample]) -> torch.Tensor | None:
    if not any(sample.versions for sample in chosen):
        return None
    return _flat((_version_by_token(sample)[1:] for sample in chosen), torch.int64)


def _version_by_token(sample: TrainingSample) -> list[int]:
    """Of every token; -1 where the policy sampled none."""
    sampled = chain.from_iterable([version] * count for version, count in sample.versions)
    return [next(sampled) if on_response else -1 for on_response in sample.response_mask]


def _flat(pieces: Iterable[Iterable[float]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(list(chain.from_iterable(pieces)), dtype=dtype)


def _by_token(sample: TrainingSample) -> list[float]:
    """The rollout log-prob of every token; 0 where there is none."""
    if not sample.rollout_log_probs:
        return [0.0] * len(sample.token_ids)
    log_probs = iter(sample.rollout_log_probs)
    return [next(log_probs) if on_response else 0.0 for on_response in sample.response_mask]


def _check(sample: TrainingSample, index: int) -> None:
    tokens, mask, log_probs = len(sample.token_ids), sample.response_mask, sample.rollout_log_probs
    if tokens < 2:
        raise DataError(f"sample {index} has {tokens} token(s); at least 2 are needed to predict one; drop it")
    if len(mask) != tokens or not set(mask) <= {0, 1}:
        raise DataError(
            f"sample {index} has {tokens} tokens and a response_mask of {len(mask)} values among "
            f"{sorted(set(mask))}; give a 0 or a 1 for each token"
        )
    if not any(mask[1:]):
        raise DataError(f"sample {index} has no response token after its first token; there is nothing to learn in it")
    if log_probs and len(log_probs) != sum(mask):
        raise DataError(
            f"sample {index} has {len(log_probs)} rollout_log_probs for {sum(mask)} response tokens; give one for each"
        )
