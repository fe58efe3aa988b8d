"""Whether Routing Replay did what it says: how much was replayed, what it forced, and whether rows are their tokens'.

Strategy: at equal weights a router's own choice is the replayed one, but for what the two engines compute otherwise.
Agreement of a layer, or of a run of tokens (one turn, or what lies between two), is held against what rows of other
tokens would give: those beside it, which a shift by one makes its own, and two drawn at random, whose experts agree as
often as the experts' load has it. Half way between that and 1 is no engine's rounding any more. A layer that sends
nearly all tokens to the same experts tells nothing of whose routes they are, and is not judged.

Shape letters: T tokens of a pack, L this pipeline stage's MoE layers, A all MoE layers, K experts a token, E experts,
R runs of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.routing.load import expert_load
from gspo_moe.routing.shards import StageLayers
from gspo_moe.routing.volatility import overlap_TL
from gspo_moe.types import Microbatch

Share = TypeVar("Share", float, torch.Tensor)

FEWEST_SLOTS = 32  # of which a layer's or a run's agreement is judged: neighbours' near ties flip together
LEAST_TOLD = 0.1  # 1 - chance of a layer that can be judged
AGREEMENT = 0.5  # of the way from chance to 1
SHIFT = 0.25  # of that way, by which a row beside its token must be nearer than its own


class ReplaySums(Statistics):
    """Of any number of packs, by layer, [A] or [A, E].

    slots, forced: expert slots that were replayed, and those of them where the router would have picked another
    expert. For packs that ran at the weights of the rollout, against what should be the replayed routes there (the live
    router's, or what is foretold of it; "live" below): own, own_slots, own_rows: slots that agree with the
    token's own row, all slots, and tokens; beside_before, beside_after, beside_slots: the same with the row of the
    token before and behind it; own_before, own_after: with the own row, of tokens that have such a one; load_replayed,
    load_live: tokens of each expert.
    """

    def to_metrics(self) -> dict[str, float]:
        """Shares over all layers; those that nothing was found for are left out."""
        total = {name: value.sum().item() for name, value in self.sums.items()}
        found = {}
        if total["slots"]:
            found["forced"] = total["forced"] / total["slots"]
        if total["own_slots"]:
            found["aligned"] = total["own"] / total["own_slots"]
            found["aligned_by_chance"] = self.chance().mean().item()
        if total["beside_slots"]:
            beside = max(total["beside_before"], total["beside_after"])
            found["aligned_shifted"] = beside / total["beside_slots"]
        return {f"routing/replay/{name}": value for name, value in found.items()}

    def chance(self) -> torch.Tensor:
        """How often experts of two tokens agree by their load alone, [A]; NaN without a row."""
        replayed, live = self.sums["load_replayed"], self.sums["load_live"]
        topk = self.sums["own_slots"] / self.sums["own_rows"]
        return (replayed * live).sum(dim=1) / self.sums["own_rows"].square() / topk

    def judged(self) -> list[int]:
        """The layers whose agreement can tell a token's routes from another's."""
        told_A = (1.0 - self.chance() > LEAST_TOLD) & (self.sums["own_slots"] >= FEWEST_SLOTS)
        found: list[int] = told_A.nonzero()[:, 0].tolist()
        return found


def replay_sums(
    pack: Microbatch,
    replayed_TLK: torch.Tensor | None,
    live_TLK: torch.Tensor | None,
    expected_TLK: torch.Tensor | None,
    layers: StageLayers,
    held_TL: torch.Tensor | None = None,
    both_TL: torch.Tensor | None = None,
) -> ReplaySums:
    """Of one pack's training forward, over the pipeline's stages. Collective over the pipeline.

    replayed_TLK: None where nothing was. live_TLK: what the routers would have picked; None where it was not recorded.
    expected_TLK: what should be the replayed ones, where the weights are those of the rollout; None where they are not.
    held_TL: where the routes were replayed, None for everywhere. both_TL: `overlap_TL` of replayed and rollout routes,
    where the caller has it.
    """
    count = len(layers.indices)
    nothing_L = torch.zeros(count, dtype=torch.float64, device=pack.cu_seqlens.device)
    nothing_LE = nothing_L[:, None].expand(count, layers.architecture.num_experts)
    found = dict.fromkeys(("slots", "forced", "own", "own_rows", "own_slots"), nothing_L)
    found |= {f"beside_{name}": nothing_L for name in ("before", "after", "slots")}
    found |= {f"own_{name}": nothing_L for name in ("before", "after")}
    found |= {"load_replayed": nothing_LE, "load_live": nothing_LE}
    if replayed_TLK is not None and live_TLK is not None:
        known_TL = both_TL if expected_TLK is live_TLK else None
        shared_TL = (overlap_TL(replayed_TLK, live_TLK) if known_TL is None else known_TL).double()
        missing_TL, here_TL = replayed_TLK.shape[2] - shared_TL, torch.ones_like(shared_TL)
        if held_TL is not None:
            missing_TL, here_TL = missing_TL * held_TL, held_TL.double()
        found |= {"slots": here_TL.sum(dim=0) * replayed_TLK.shape[2], "forced": missing_TL.sum(dim=0)}
    if replayed_TLK is not None and expected_TLK is not None:
        both_TL = overlap_TL(replayed_TLK, expected_TLK) if both_TL is None else both_TL
        overlap, slots = both_TL.double().sum(dim=0), nothing_L + replayed_TLK.shape[0] * replayed_TLK.shape[2]
        found |= {"own": overlap, "own_rows": nothing_L + len(replayed_TLK), "own_slots": slots}
        found |= _beside(pack, replayed_TLK, expected_TLK, both_TL.double())
        experts = layers.architecture.num_experts
        found |= {"load_replayed": expert_load(replayed_TLK, experts).double()}
        found |= {"load_live": expert_load(expected_TLK, experts).double()}
    flat = torch.cat([value.reshape(count, -1) for value in found.values()], dim=1)
    whole = layers.spread(flat[None])[0].split([value.reshape(count, -1).shape[1] for value in found.values()], dim=1)
    sums = {
        name: part if value.ndim == 2 else part[:, 0] for (name, value), part in zip(found.items(), whole, strict=True)
    }
    return ReplaySums(sums, {})


def _beside(
    pack: Microbatch, replayed_TLK: torch.Tensor, live_TLK: torch.Tensor, shared_TL: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Agreement with the rows of the tokens before and behind, within sequences; of the same tokens with their own."""
    sequence_T = pack.sequence_T
    inside = sequence_T[1:] == sequence_T[:-1]
    before = overlap_TL(replayed_TLK[:-1][inside], live_TLK[1:][inside]).double().sum(dim=0)
    after = overlap_TL(replayed_TLK[1:][inside], live_TLK[:-1][inside]).double().sum(dim=0)
    slots = torch.full_like(before, replayed_TLK.shape[2]) * inside.sum()
    own_before, own_after = shared_TL[1:][inside].sum(dim=0), shared_TL[:-1][inside].sum(dim=0)
    found = {"beside_before": before, "beside_after": after, "beside_slots": slots}
    return found | {"own_before": own_before, "own_after": own_after}


@dataclass(frozen=True)
class Run:
    """Tokens of one sequence, all of the policy's or none, that stand together.

    agreement: share of their slots, in the judged layer where it is highest: routes of other tokens are wrong in all.
    """

    sample: int
    start: int
    stop: int
    sampled: bool
    agreement: float


def wrong_runs(pack: Microbatch, shared_TL: torch.Tensor, sums: ReplaySums, layers: StageLayers) -> list[Run]:
    """The pack's runs whose routes are not their tokens', in its order. Collective over the pipeline.

    shared_TL: `overlap_TL` of replayed and live (or foretold) routes, which ran at equal weights. sums: over all
    ranks, on the host. They alone are fetched from the device.
    """
    judged = sums.judged()
    if not judged:
        return []
    least = _half_way(sums.chance()[judged].mean().item())
    sequence_T, sampled_T = pack.sequence_T, pack.route_mask_T
    starts_T = torch.ones_like(sampled_T)
    starts_T[1:] = (sequence_T[1:] != sequence_T[:-1]) | (sampled_T[1:] != sampled_T[:-1])
    run_T = starts_T.long().cumsum(0) - 1
    # As many rows as tokens: only the device knows how many runs there are.
    shared_RL = torch.zeros_like(shared_TL).index_add(0, run_T, shared_TL)
    topk = layers.architecture.num_experts_per_tok
    slots_R = torch.zeros_like(run_T).index_add(0, run_T, torch.full_like(run_T, topk))
    agreement_R = layers.spread(shared_RL)[:, judged].amax(dim=1).double() / slots_R
    wrong = ((slots_R * len(judged) >= FEWEST_SLOTS) & (agreement_R < least)).nonzero()[:, 0].tolist()
    if not wrong:
        return []
    bounds = [*starts_T.nonzero()[:, 0].tolist(), pack.num_tokens]
    found = []
    for run in wrong:
        start, stop = bounds[run : run + 2]
        number = int(sequence_T[start])
        offset = int(pack.cu_seqlens[number])
        where = pack.sample_indices[number], start - offset, stop - offset
        found.append(Run(*where, bool(sampled_T[start]), agreement_R[run].item()))
    return found


def _half_way(chance: Share) -> Share:
    return chance + AGREEMENT * (1.0 - chance)


def alignment_faults(sums: ReplaySums, equal_weights: bool, found: Sequence[Run]) -> Iterator[str]:
    """What shows that replayed rows are not their tokens', the widest first.

    sums: over all ranks. equal_weights: the rollout's weights were the step's first; else rows beside their own are the
    only sure sign. found: this rank's wrong runs. Nothing where routers send nearly all tokens to the same experts.
    """
    judged = sums.judged()
    if not judged:
        return
    by_layer, chance_A = {name: value[judged] for name, value in sums.sums.items()}, sums.chance()[judged]
    total = {name: value.sum().item() for name, value in by_layer.items()}
    slots = total["beside_slots"]
    for side, which in (("before", "behind"), ("after", "before")):
        own, beside = total[f"own_{side}"], total[f"beside_{side}"]
        if slots >= FEWEST_SLOTS and beside > own + SHIFT * (1.0 - chance_A.mean().item()) * slots:
            yield (
                f"replayed routes are shifted by one token: {beside / slots:.0%} of expert slots agree with the live "
                f"router's for the token {which} it, {own / slots:.0%} for their own"
            )
            return
    if not equal_weights:
        return
    for run in found[:1]:
        whose = "a turn of the policy's" if run.sampled else "prompt, or between turns"
        yield (
            f"sample {run.sample}, tokens {run.start} to {run.stop - 1} ({whose}): replayed routes are not these "
            f"tokens', no layer has more than {run.agreement:.0%} of expert slots as the live router has them"
        )
        return
    agreement_A = by_layer["own"] / by_layer["own_slots"]
    wrong = (agreement_A < _half_way(chance_A)).nonzero()[:, 0].tolist()
    if wrong:
        named = ", ".join(f"{judged[index]} ({agreement_A[index]:.0%})" for index in wrong)
        yield f"replayed routes of MoE layers {named} are not those layers': share of slots that agree in brackets"
