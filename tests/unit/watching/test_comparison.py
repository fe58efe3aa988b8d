"""The figures of two snapshots, against sets and float64 by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import gspo_moe
from gspo_moe.errors import DataError
from gspo_moe.watching import Snapshot, compare
from tests.families import tiny, tokens

IDS, ATTENTION, RESPONSE = tokens()


def moved(family: str) -> tuple[Snapshot, Snapshot, Snapshot]:
    """Before and after weights moved, and after with the routes of before."""
    model = tiny(family)
    watcher = gspo_moe.watch(model)
    old = watcher.snapshot(IDS, ATTENTION, RESPONSE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return (
        old,
        watcher.snapshot(IDS, ATTENTION, RESPONSE),
        watcher.snapshot(IDS, ATTENTION, RESPONSE, routes=old.routes_TLK),
    )


def test_figures_are_those_of_sets_of_experts() -> None:
    old, new, _ = moved("Qwen3Moe")
    found = compare(old, new).to_metrics()
    changes, flips, shifts = [], [], []
    assert old.log_scores_MLE is not None
    assert new.log_scores_MLE is not None
    counted = old.masks.routes_T.nonzero().flatten().tolist()
    for place, token in enumerate(counted):
        before = [set(layer) for layer in old.routes_TLK[token].tolist()]
        after = [set(layer) for layer in new.routes_TLK[token].tolist()]
        changes += [[1 - len(a & b) / 2 for a, b in zip(before, after, strict=True)]]
        flips += [[a != b for a, b in zip(before, after, strict=True)]]
        delta = (new.log_scores_MLE[place] - old.log_scores_MLE[place]).double().abs()
        shifts += [np.exp(-np.mean([[delta[layer, e] for e in experts] for layer, experts in enumerate(before)]))]
    assert found["slot_change"] == pytest.approx(np.mean(changes))
    assert found["slot_change_by_layer"] == pytest.approx(np.mean(changes, axis=0))
    assert found["any_layer_flip"] == pytest.approx(np.mean(np.max(flips, axis=1)))
    assert found["router_shift"] == pytest.approx(np.mean(shifts), abs=1e-6)
    assert 0 < np.mean(changes) < 1
    logged = compare(old, new).figures("update").metrics
    assert logged["routing/update/slot_change"] == found["slot_change"]


def test_phi_and_washout_are_those_of_the_responses_targets() -> None:
    old, new, held = moved("DeepseekV3")
    found = compare(old, new, held).to_metrics()
    targets = (RESPONSE[:, 1:] & ATTENTION[:, :-1]).bool().numpy()
    values = [one.log_probs_T.view(3, 10)[:, :-1].double().numpy() for one in (old, new, held)]  # type: ignore[union-attr]
    a = [row[mask] for row, mask in zip(values[2] - values[0], targets, strict=True)]
    b = [row[mask] for row, mask in zip(values[1] - values[2], targets, strict=True)]
    a_T, b_T = np.concatenate(a), np.concatenate(b)
    a_N, b_N = (np.array([row.mean() for row in rows]) for rows in (a, b))
    assert found["phi_token"] == pytest.approx(np.cov(b_T, a_T + b_T)[0, 1] / np.var(a_T + b_T, ddof=1))
    assert found["phi_sequence"] == pytest.approx(np.cov(b_N, a_N + b_N)[0, 1] / np.var(a_N + b_N, ddof=1))
    assert found["washout"] == pytest.approx(len(a_T) / 3 * np.var(b_N, ddof=1) / np.var(b_T, ddof=1))
    d = a_T + b_T
    assert found["k3"] == pytest.approx(np.mean(np.exp(d) - 1 - d))
    assert found["log_prob_change_abs"] == pytest.approx(np.abs(d).mean())


def test_other_tokens_or_models_are_not_compared() -> None:
    old, new, _ = moved("Qwen3Moe")
    assert new.token_ids_T is not None
    with pytest.raises(DataError, match="of other tokens"):
        compare(old, replace(new, token_ids_T=new.token_ids_T.flip(0)))
    with pytest.raises(DataError, match="compare one architecture over the same tokens"):
        compare(old, gspo_moe.watch(tiny("Qwen3Moe", num_experts_per_tok=3)).snapshot(IDS, ATTENTION, RESPONSE))
