"""A watcher on megatron-core's routers, against the trainer's own recorder and replay."""

from __future__ import annotations

import torch

import gspo_moe
from gspo_moe.config.schema import Config
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.types import TrainingSample
from tests.policy import SIZES, packs_of, trained
from tests.qwen3 import layout, random_sequences


def test_routes_scores_and_replay_are_the_recorders() -> None:
    sequences = random_sequences(SIZES, (9, 4, 13), seed=7)
    (pack,) = packs_of([TrainingSample(tuple(ids.tolist()), (0,) + (1,) * (len(ids) - 1)) for ids in sequences], 3)
    ones = torch.ones(1, pack.num_tokens)
    with trained(Config(), layout()) as (model, _), torch.no_grad():
        record = RouteRecorder(model.chunks, SIZES, model.groups, scores=True).start()
        watcher = gspo_moe.watch(model.chunks[0])
        with watcher.capture(ones) as captured:
            score(model, [pack], record=record)
        found, (recorded,) = captured.snapshot(), record.recordings()
        routes_TLK = recorded.routes_TLK.roll(1, dims=0)
        with watcher.capture(ones, routes=routes_TLK) as captured:
            (held,) = score(model, [pack])
        captured.snapshot()
        (replayed,) = score(model, [pack], routes=[routes_TLK])
    assert torch.equal(found.routes_TLK.long().sort(2).values, recorded.routes_TLK.long().sort(2).values)
    assert recorded.own is not None
    assert found.margin_ML is not None
    assert found.log_scores_MLE is not None
    torch.testing.assert_close(found.margin_ML, recorded.own.margin_TL[:-1], atol=1e-6, rtol=0)
    own = found.log_scores_MLE.gather(2, recorded.routes_TLK[:-1].long())
    torch.testing.assert_close(own, recorded.own.log_probs_TLK[:-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(held, replayed, atol=1e-5, rtol=0)


def test_rows_of_a_batch_come_out_in_order() -> None:
    """megatron-core's tokens are [sequence, batch]."""
    from gspo_moe.model.router import PaddingAwareRouter

    with trained(Config(), layout()) as (model, _), torch.no_grad():
        router = next(module for module in model.chunks[0].modules() if isinstance(module, PaddingAwareRouter))
        hidden = torch.randn(5, 3, SIZES.hidden_size)
        watcher = gspo_moe.watch(torch.nn.Sequential(router))
        with watcher.capture(torch.ones(3, 5)) as captured:
            router(hidden)
        logits = hidden.transpose(0, 1).reshape(15, -1) @ router.weight.T
    expected = logits.topk(2, dim=1).indices.sort(dim=1).values
    assert torch.equal(captured.snapshot().routes_TLK[:, 0].long().sort(1).values, expected)
