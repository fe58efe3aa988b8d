"""Losses and metrics of sequences that are split over ranks equal those of whole sequences, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gspo_moe.algorithms import KLPenalty
from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.errors import DataError
from gspo_moe.parallel.context import ContextSplit, split_context, sum_over
from gspo_moe.routing import RouteSums, overlap_TL
from tests.launch import launch
from tests.losses import CLIPS, WHOLE_SEQUENCES, correct, mismatch, policy_loss

# Several are shorter than the 8 chunks of 4 ranks; of the second pack most ranks hold no token.
# In the third one rank of two holds as many tokens as there are sequences, all of them of one.
PACKS = ((13, 1, 8, 3, 16, 5, 40), (1,), (4, 1))
BY_TOKEN = ("token_advantages", "log_probs", "old_log_probs", "response_mask", "router_shift", "reference", "engine")


def drawn(algorithm: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Ratios on both sides of the clip; responses of one stretch at the end, so that some ranks hold only prompt."""
    generator = torch.Generator().manual_seed(len(lengths))

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    total = sum(lengths)
    masks = [(torch.arange(length) >= length // 2).double() for length in lengths]
    old = -normal(total).abs()
    shift = normal(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return {
        "log_probs": old + min(1.5 * CLIPS[algorithm][1], 1.0) * (normal(total) + shift),
        "old_log_probs": old,
        "advantages": normal(len(lengths)),
        "token_advantages": normal(total),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0)]),
        "response_mask": torch.cat(masks),
        "router_shift": 1.0 - 0.4 * torch.rand(total, generator=generator, dtype=torch.float64),
        "reference": old + 0.1 * normal(total),
        "engine": old + 0.1 * normal(total),
    }


def loss_and_gradient(algorithm: str, pack: dict[str, torch.Tensor], **more: Any) -> tuple[Any, torch.Tensor]:
    """With a correction and a reference; `num_tokens` and `max_response_tokens` stand for those of a mini-batch."""
    low, high = CLIPS[algorithm]
    log_probs = pack["log_probs"].clone().requires_grad_()
    given = {name: value for name, value in pack.items() if name not in ("reference", "engine", "token_advantages")}
    if algorithm == "ppo":
        given["advantages"] = pack["token_advantages"]
    over = {name: value for name, value in more.items() if name == "sum_over_context"}
    level = "sequence" if algorithm in WHOLE_SEQUENCES else "token"
    scored = (pack["old_log_probs"], pack["engine"], pack["cu_seqlens"], pack["response_mask"])
    correction, _ = correct("mask", level, (0.95, 1.1), *scored, **over)
    arguments: dict[str, Any] = {**given, "log_probs": log_probs, "clip_low": low, "clip_high": high, **more}
    result = policy_loss(
        algorithm,
        **arguments,
        num_tokens=200.0,
        max_response_tokens=30,
        correction=correction,
        kl=KLPenalty(pack["reference"], 0.1, "k3"),
    )
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    return result, gradient


def here(pack: dict[str, torch.Tensor], group: dist.ProcessGroup) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This rank's part of a pack and which tokens it is."""
    tokens, bounds = split_context(pack["cu_seqlens"], group.size(), group.rank())
    return {**pack, **{name: pack[name][tokens] for name in BY_TOKEN}, "cu_seqlens": bounds}, tokens


def same(split: Statistics, whole: Statistics, group: dist.ProcessGroup) -> None:
    """Checks that the ranks' statistics, merged, give the metrics of the whole."""
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, split, group=group)
    found, expected = functools.reduce(Statistics.merge, parts).to_metrics(), whole.to_metrics()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def check_losses(group: dist.ProcessGroup) -> None:
    clipped = set()
    for algorithm in CLIPS:
        for lengths in PACKS:
            pack = drawn(algorithm, lengths)
            whole, whole_gradient = loss_and_gradient(algorithm, pack, num_sequences=9)
            part, tokens = here(pack, group)
            split, gradient = loss_and_gradient(algorithm, part, num_sequences=9, sum_over_context=sum_over(group))
            torch.testing.assert_close(split.loss, whole.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient, whole_gradient[tokens], rtol=1e-12, atol=1e-12)
            same(split.sums, whole.sums, group)
            if 0 < whole.metrics["clip_fraction/sequence"] < 1:
                clipped.add(algorithm)
    assert clipped == set(CLIPS)


def check_mismatch(group: dist.ProcessGroup) -> None:
    pack = drawn("grpo", PACKS[0])
    part, _ = here(pack, group)
    names = ("log_probs", "old_log_probs", "cu_seqlens", "response_mask")
    split = mismatch(*(part[name] for name in names), sum_over_context=sum_over(group))
    same(split, mismatch(*(pack[name] for name in names)), group)
    for level in ("token", "sequence"):
        _, whole = correct("mask", level, (0.9, 1.05), *(pack[name] for name in names))
        _, split_weights = correct(
            "mask", level, (0.9, 1.05), *(part[name] for name in names), sum_over_context=sum_over(group)
        )
        same(split_weights, whole, group)


def check_routing(group: dist.ProcessGroup) -> None:
    """Tokens are counted where they are: no sum inside a sequence is needed."""
    generator = torch.Generator().manual_seed(3)
    cu_seqlens = drawn("gspo", PACKS[0])["cu_seqlens"]
    old, new = (torch.rand(sum(PACKS[0]), 3, 8, generator=generator).topk(2).indices for _ in range(2))
    tokens, _ = split_context(cu_seqlens, group.size(), group.rank())
    whole = RouteSums.from_overlap(overlap_TL(old, new), topk=2)
    part = RouteSums.from_overlap(overlap_TL(old[tokens], new[tokens]), topk=2)
    same(part, whole, group)


def check_whole(group: dist.ProcessGroup) -> None:
    """What a rank cuts out of a pack and the others cut out of it are the pack, in every type that is gathered."""
    for lengths in PACKS:
        split = ContextSplit(drawn("gspo", lengths)["cu_seqlens"], group)
        generator = torch.Generator().manual_seed(4)
        routes_TLK = torch.randint(600, (sum(lengths), 3, 2), generator=generator, dtype=torch.int16)
        for values in (routes_TLK, routes_TLK[:, 0, 0].float(), routes_TLK[:, 0] > 300):
            assert torch.equal(split.whole(split.local(values)), values)
        assert split.num_local == len(split.tokens_C)


def check_empty_response(group: dist.ProcessGroup) -> None:
    """What no rank has a response token of is refused on all of them."""
    pack = drawn("gspo", PACKS[0])
    pack["response_mask"][: PACKS[0][0]] = 0
    part, _ = here(pack, group)
    with pytest.raises(DataError, match="sequence 0 of the pack has no response token"):
        loss_and_gradient("gspo", part, sum_over_context=sum_over(group))


def check_all() -> None:
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = dist.group.WORLD
    assert group is not None
    for context in (pairs[dist.get_rank() // 2], group):
        check_losses(context)
        check_mismatch(context)
        check_routing(context)
        check_whole(context)
        check_empty_response(context)
    dist.destroy_process_group()


def test_sequences_split_over_two_and_four_ranks_give_the_numbers_of_whole_ones() -> None:
    launch(check_all, 4)
