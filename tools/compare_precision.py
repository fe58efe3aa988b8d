"""What bf16 changes: `python tools/compare_precision.py CONFIG.yaml [section.key=value ...]`.

The config's model answers some prompts in fp32; then fp32, bf16, and bf16 with an fp32 router score the same answers.
Printed against fp32, per row: the log-prob differences, the sequence ratio (what GSPO clips), the share of sequences
whose ratio leaves GSPO's clip range by precision alone, and the expert slots that change.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

VARIANTS = (
    ("fp32, other packing", ("schedule.micro_batch_tokens=512",)),
    ("bf16", ("model.dtype=bf16",)),
    ("bf16, fp32 router", ("model.dtype=bf16", "routing.router_dtype=fp32")),
)
PROMPTS = 64


def score_variant(path: str, overrides: list[str], samples: list[Any] | None) -> tuple[list[Any], dict[int, Any]]:
    """The samples (made where none are given) and, by sample, log-probs [T], response mask [T] and routes [T, L, K]."""
    from gspo_moe.config import load_config
    from gspo_moe.parallel.groups import leave_layout
    from gspo_moe.routing.recorder import RouteRecorder
    from gspo_moe.scoring.score import score
    from gspo_moe.training.packs import microbatches, pack_share
    from gspo_moe.training.preflight import preflight
    from gspo_moe.training.session import open_session

    config = load_config(path, overrides)
    session = open_session(preflight(config))
    samples = samples or answer(session)
    packs = microbatches(pack_share(samples, session.groups, config))
    record = RouteRecorder(session.model.chunks, session.model.architecture, session.groups).start()
    scored = score(session.model, packs, record=record)
    found = {}
    for pack, log_probs_T, recording in zip(packs, scored, record.recordings(), strict=True):
        bounds = pack.cu_seqlens.tolist()
        for index, a, b in zip(pack.sample_indices, bounds, bounds[1:], strict=False):
            mask_T, route_mask_T = pack.response_mask_T[a:b].bool(), pack.route_mask_T[a:b]
            found[index] = (log_probs_T[a:b].double()[mask_T], recording.routes_TLK[a:b][route_mask_T])
    session.close()
    leave_layout()
    return samples, found


def answer(session: Any) -> list[Any]:
    from gspo_moe.rollout.engine import SamplingParams
    from gspo_moe.types import TrainingSample

    limit = session.config.rollout.max_response_tokens
    params = SamplingParams(1.0, 1.0, 0, limit, session.stop_ids, seed="precision")
    prompts = [session.plan.task.prompts.prompt("eval", index) for index in range(PROMPTS)]
    groups = session.answerer.generate(prompts, 4, params)
    return [
        TrainingSample(
            token_ids=rollout.prompt_ids + rollout.response_ids,
            response_mask=(0,) * len(rollout.prompt_ids) + (1,) * len(rollout.response_ids),
        )
        for group in groups
        for rollout in group.rollouts
    ]


def differences(found: dict[int, Any], reference: dict[int, Any]) -> list[float]:
    """Mean and largest |d|, std of the sequence ratio, share outside [1 - 3e-4, 1 + 4e-4], expert slots changed."""
    from gspo_moe.routing import volatility

    d = [found[i][0] - reference[i][0] for i in reference]
    ratio = torch.stack([one.mean() for one in d]).exp()
    every = torch.cat(d).abs()
    routes = [torch.cat([side[i][1] for i in reference]) for side in (reference, found)]
    outside = ((ratio < 1 - 3e-4) | (ratio > 1 + 4e-4)).double().mean()
    slot_change = volatility(*routes)["slot_change"]
    assert isinstance(slot_change, float)
    return [float(every.mean()), float(every.max()), float(ratio.std()), float(outside), slot_change]


def main() -> None:
    parser = argparse.ArgumentParser(description="What bf16 changes.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    samples, reference = score_variant(options.config, options.overrides, None)
    print(
        "| against fp32 | mean abs d | max abs d | sequence ratio std | outside the clip range | expert slots changed |"
    )
    print("|---|---|---|---|---|---|")
    for name, more in VARIANTS:
        _, found = score_variant(options.config, [*options.overrides, *more], samples)
        mean, largest, std, outside, slots = differences(found, reference)
        print(f"| {name} | {mean:.1e} | {largest:.1e} | {std:.1e} | {outside:.1%} | {slots:.2%} |")


if __name__ == "__main__":
    main()
