"""Rollouts, scores, routes, an optimizer step, checkpoints: what several processes find is what one process finds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_moe.algorithms.statistics import Statistics
from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.rope import Yarn
from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.weights import load_weights
from gspo_moe.parallel.groups import Groups, initialize, shut_down
from gspo_moe.parallel.reduce import from_last_stage, gather_over_data, reduce_statistics
from gspo_moe.platform import prepare_megatron
from gspo_moe.rollout.embedded import engine
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.stop_strings import StopStrings
from gspo_moe.routing.audit import ReplaySums, replay_sums
from gspo_moe.routing.comparison import gather_layers
from gspo_moe.routing.recorder import Recording, RouteRecorder
from gspo_moe.routing.replay import Replayed
from gspo_moe.scoring.score import score
from gspo_moe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.replicas import ReplicaCheck
from gspo_moe.types import Microbatch, Rollout, TrainingSample
from tests.launch import launch, renew_port
from tests.policy import Letters, LoudRows, as_sample, requests, sampling, score_and_record, trained
from tests.qwen3 import architecture, layout
from tests.steps import train_minibatch

# Four layers for an interleaved pipeline. Of 131 rows 61 are tokens: all of the second tensor rank's are padding.
YARN = Yarn(factor=4.0, original_max_position_embeddings=8)
SIZES = architecture(num_hidden_layers=4, initializer_range=0.2, vocab_size=131, rope_scaling=YARN)
VOCAB = 61
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"expert": 2},
        {"expert": 2, "distributed_optimizer": True},
        {"tensor": 2, "recompute": "selective"},
        {"pipeline": 2, "recompute": "full"},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2, "distributed_optimizer": True},
    ],
    4: [{"tensor": 2, "expert": 2, "expert_tensor": 1, "fused_log_probs": False}],
}
LETTERS: Any = Letters()
PAIRS = [LETTERS.decode((first, second)) for first in range(1, VOCAB, 2) for second in range(0, VOCAB, 2)]
SAMPLINGS = {
    "greedy": dataclasses.replace(sampling(temperature=0.0), stop_strings=StopStrings(PAIRS, LETTERS)),
    "sampled": dataclasses.replace(sampling(), report_routes=True),
}
CHECKPOINT = "step_00000001"
TOLERANCE = {
    "routes": 0.0,
    "log_probs": 1e-5,
    "after": 2e-5,
    "held": 2e-5,
    "partly": 2e-5,
    "after_held": 4e-5,
}  # by steps
DONE = Progress(step=1, prompt_position=14, policy_version=1)
GSPO = AlgorithmConfig.model_validate(
    {
        "clip_low": 5e-3,
        "clip_high": 5e-3,
        "kl": {"coeff": 0.01, "estimator": "k2"},
        "mismatch": {"correction": "tis", "level": "sequence", "high": 1.001},
    }
)
RSPO = AlgorithmConfig(name="rspo")
Named = dict[tuple[str, int], Any]


def config(**parallel: Any) -> Config:
    """Adam's first step with a large eps is smooth in the gradient; with a small one it is the gradient's sign."""
    fused = parallel.pop("fused_log_probs", True)
    model = {"preset": "tiny", "fused_log_probs": fused}
    sections = {"model": model, "optimizer": {"lr": 1.0, "eps": 1.0}, "parallel": parallel}
    return Config.model_validate({**sections, "routing": {"replay": "r2"}})  # the optimizer watches routers for it


def share(groups: Groups, values: Sequence[Any]) -> list[Any]:
    """What this data-parallel rank has of a list that all know."""
    return list(values[groups.data_rank :: groups.layout.data])


def generate(model: Model) -> dict[str, Named]:
    """The rollouts of this rank's requests, by kind of sampling, uid and sample."""
    sampler = MegatronEngine(model, max_batch=10, prefill_tokens=9)
    mine = share(model.groups, requests(samples=3))
    return {
        kind: {(r.uid, r.sample_index): r for group in sampler.generate(mine, params) for r in group}
        for kind, params in SAMPLINGS.items()
    }


def together(groups: Groups, named: dict[str, Named]) -> dict[str, Named]:
    parts = gather_over_data(named, groups)
    return {kind: {name: value for part in parts for name, value in part[kind].items()} for kind in named}


def packs(groups: Groups, samples: Sequence[TrainingSample]) -> list[Microbatch]:
    """This rank's share, sequences of one position by themselves; indices are those among all samples."""
    mine = share(groups, range(len(samples)))
    short = [index for index in mine if len(samples[index].token_ids) == 2]
    long = [index for index in mine if index not in short]
    chosen = [long[start : start + 2] for start in range(0, len(long), 2)] + [[index] for index in short]
    return [pack(samples, indices) for indices in chosen]


def by_sample(values: Sequence[torch.Tensor], mine: Sequence[Microbatch]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for one, values_T in zip(mine, values, strict=False):
        found |= zip(one.sample_indices, values_T.split(one.cu_seqlens.diff().tolist()), strict=True)
    return found


def reference_model(groups: Groups, parallel: dict[str, Any]) -> Model:
    model = build_model(config(**parallel), SIZES, groups, vocab=VOCAB)
    load_weights(model, LoudRows(SIZES, 5, VOCAB))
    return model


def observe(
    model: Model,
    optimizer: Optimizer,
    samples: Sequence[TrainingSample],
    old: dict[int, torch.Tensor],
    parallel: dict[str, Any],
) -> Any:
    """Log-probs, routes, figures of a step and of one with replayed routes, and log-probs behind each of them.

    Log-probs on the last stage only.
    """
    mine = packs(model.groups, samples)
    recorder = RouteRecorder(model.chunks, SIZES, model.groups, scores=True)
    scored, old_routes = score_and_record(model, mine, recorder)
    log_probs, routes = by_sample(scored, mine), all_layers(old_routes, recorder)
    old = old or {index: value + 0.01 * (-1) ** (index // 2) for index, value in log_probs.items()}
    olds = [torch.cat([old[index] for index in one.sample_indices]) for one in mine]
    reference = score(reference_model(model.groups, parallel), mine)
    result = train_minibatch(
        model, optimizer, mine, olds, GSPO, len(samples), 1.0, recorder, reference_log_probs=reference
    )
    trained_routes = all_layers(result.routes, recorder)
    assert all(torch.equal(a, b) for a, b in zip(routes, trained_routes, strict=True))
    after = by_sample(score(model, mine), mine)
    foreign = [torch.cat([foreign_routes(index, samples) for index in one.sample_indices]) for one in mine]
    foreign = [routes_TAK[:, list(recorder.layers.indices)] for routes_TAK in foreign]
    held = score(model, mine, routes=foreign, responses_only=True)
    partly = score(model, mine, routes=[in_part(one) for one in foreign], responses_only=True)
    replayed = train_minibatch(
        model, optimizer, mine, held, AlgorithmConfig(name="grpo"), len(samples), 1.0, None, replayed=foreign
    )
    assert replayed.statistics.to_metrics()["ratio/token_std"] == 0
    after_held = by_sample(score(model, mine), mine)
    shifted = train_minibatch(model, optimizer, mine, olds, RSPO, len(samples), 1.0, recorder, old_routes=old_routes)
    grad_norms = {"grad_norm": result.update.grad_norm, "replayed_grad_norm": replayed.update.grad_norm}
    grad_norms["router_grad_norm"] = replayed.update.router_grad_norm or 0.0
    each = zip(mine, foreign, old_routes, strict=True)
    audits = [replay_sums(one, held, live.routes_TLK, live.routes_TLK, recorder.layers) for one, held, live in each]
    audit = reduce_statistics(reduce(ReplaySums.merge, audits), model.groups.data)
    rspo = {f"rspo {name}": value for name, value in shifted.statistics.to_metrics().items()}
    rspo["rspo grad_norm"] = shifted.update.grad_norm
    return {
        "log_probs": log_probs,
        "routes": by_sample(routes, mine),
        "metrics": result.statistics.to_metrics() | grad_norms | rspo | audit.to_metrics(),
        "after": after,
        "held": by_sample(held, mine),
        "partly": by_sample(partly, mine),
        "after_held": after_held,
        "old": old,
    }


def all_layers(recordings: Sequence[Recording], recorder: RouteRecorder) -> list[torch.Tensor]:
    found = [gather_layers(one.routes_TLK, recorder.layers) for one in recordings]
    return [routes_TAK.int().sort(dim=-1).values for routes_TAK in found]


def in_part(routes_TLK: torch.Tensor) -> Replayed:
    """Weights of their own, and rows that route live, by what the routes are: the same in every layout."""
    gates_TLK = (routes_TLK + 1.0) / (routes_TLK + 1.0).sum(dim=-1, keepdim=True)
    return Replayed(routes_TLK, gates_TLK, routes_TLK[..., 0] % 3 > 0)


def foreign_routes(index: int, samples: Sequence[TrainingSample]) -> torch.Tensor:
    """Experts drawn at random for each token of a sample and each layer."""
    shape = (len(samples[index].token_ids) - 1, SIZES.num_hidden_layers, SIZES.num_experts)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(index))
    return drawn.argsort(dim=-1)[..., : SIZES.num_experts_per_tok]


def one_process() -> dict[str, Any]:
    """What every layout must find."""
    with trained(config(), layout(), SIZES, LoudRows(SIZES, 2, VOCAB), VOCAB) as (model, optimizer):
        rollouts = generate(model)
        samples = [
            as_sample(rollout, advantage=(-1.0) ** number * (1 + number / 9))
            for number, rollout in enumerate(rollouts["sampled"].values())
            if len(rollout.prompt_ids) > 1
        ][:12]
        # Under sequence parallelism one position is less than a tensor rank's share of the padded pack.
        samples += [TrainingSample((token, 7), (0, 1), advantage=0.5) for token in (3, 44)]
        return {"rollouts": rollouts, "samples": samples, **observe(model, optimizer, samples, {}, {})}


def check_whole_steps(expected: dict[str, Named]) -> None:
    """Each decode step by the model's own forward, in which the allgather dispatcher has the ranks meet."""
    parallel = {"dispatcher": "allgather"}
    lean, engine.lean_obstacle = engine.lean_obstacle, lambda model: "as with Transformer Engine's experts"
    policy = config(**parallel), layout(2), SIZES
    with trained(*policy, LoudRows(SIZES, 2, VOCAB), VOCAB) as (model, _):
        mine = generate(model)
        steps = sum(len(one.response_ids) for one in mine["sampled"].values())
        assert len(set(gather_over_data(steps, model.groups))) == 2, "one rank has to step for the other"
        same_rollouts(together(model.groups, mine), expected, parallel)
    engine.lean_obstacle = lean


def check_layouts(world_size: int, folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=False)
    if world_size == 2:
        check_whole_steps(expected["rollouts"])
    for parallel in LAYOUTS[world_size]:
        policy = config(**parallel), layout(world_size, **parallel), SIZES
        with trained(*policy, LoudRows(SIZES, 2, VOCAB), VOCAB) as (model, optimizer):
            same_rollouts(together(model.groups, generate(model)), expected["rollouts"], parallel)
            found = observe(model, optimizer, expected["samples"], expected["old"], parallel)
            same_numbers(model.groups, found, expected, parallel)
            ReplicaCheck(model, MegatronEngine(model, max_batch=1, prefill_tokens=1))(step=1)
            if world_size == 2:  # whose checkpoints test_checkpoint_layouts hands on
                continue
            save_checkpoint(folder, model, optimizer, DONE, keep=1)
            second = observe(model, optimizer, expected["samples"], expected["old"], parallel)["metrics"]
        with trained(*policy, LoudRows(SIZES, 9, VOCAB), VOCAB) as (model, optimizer):
            assert load_checkpoint(folder / CHECKPOINT, model, optimizer) == DONE
            again = observe(model, optimizer, expected["samples"], expected["old"], parallel)["metrics"]
            assert again == second, parallel


def same_rollouts(found: dict[str, Named], expected: dict[str, Named], parallel: dict[str, Any]) -> None:
    for kind, named in expected.items():
        assert found[kind].keys() == named.keys()
        for name, rollout in named.items():
            one: Rollout = found[kind][name]
            assert (one.response_ids, one.finish) == (rollout.response_ids, rollout.finish), (parallel, kind, name)
            assert one.log_probs == pytest.approx(rollout.log_probs, abs=1e-4), (parallel, kind, name)
            assert (one.routes is None) == (kind == "greedy")
            if one.routes is not None and rollout.routes is not None:
                assert torch.equal(one.routes.sort(dim=-1).values, rollout.routes.sort(dim=-1).values), (parallel, name)


def same_numbers(groups: Groups, found: Any, expected: Any, parallel: dict[str, int]) -> None:
    for name in (
        ("routes", "log_probs", "after", "held", "partly", "after_held") if groups.is_last_stage else ("routes",)
    ):
        parts = gather_over_data(found[name], groups)
        values = {index: value for part in parts for index, value in part.items()}
        assert values.keys() == expected[name].keys()
        for index, value in values.items():
            error = (value - expected[name][index]).abs().max().item()
            assert error <= TOLERANCE[name], (parallel, name, index, error)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6), parallel


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_finds_what_one_process_finds(world_size: int, tmp_path: Path) -> None:
    expected = one_process()
    lengths = {len(rollout.response_ids) for rollout in expected["rollouts"]["sampled"].values()}
    assert len(lengths) > 3
    greedy = expected["rollouts"]["greedy"].values()
    assert any(r.finish == "stop" and LETTERS.decode(r.response_ids[-2:]) in PAIRS for r in greedy)
    assert (
        max(token for named in expected["rollouts"].values() for r in named.values() for token in r.response_ids)
        < VOCAB
    )
    assert 0 < expected["metrics"]["clip_fraction/sequence"] < 1
    assert 0 < expected["metrics"]["rspo router_shift/floored"] < 1
    torch.save(expected, tmp_path / "expected.pt")
    launch(check_layouts, world_size, world_size, tmp_path)


class Figures(Statistics):
    """A sum, a sum for each of three layers, and two maxima."""

    @classmethod
    def drawn(cls, seed: int) -> Figures:
        values = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return cls({"tokens": values[0], "flips_L": values[1:4]}, {"max": values[4], "negated_min": values[5]})

    def to_metrics(self) -> dict[str, float | list[float]]:
        return {name: value.tolist() for name, value in (self.sums | self.maxima).items()}


@contextlib.contextmanager
def joined(**parallel: int) -> Iterator[Groups]:
    groups = initialize(layout(2, **parallel), seed=1)
    try:
        yield groups
        renew_port()
    finally:
        shut_down()


def check_collectives() -> None:
    with joined() as groups:
        check_reductions(groups)
        check_uneven_parts(groups)
    with joined(pipeline=2) as groups:
        value = {"stage": groups.rank, "tensor": torch.full((2,), float(groups.rank))}
        found = from_last_stage(value, groups)
        assert found["stage"] == 1
        assert found["tensor"].tolist() == [1.0, 1.0]
        assert gather_over_data(groups.rank, groups) == [groups.rank]


def check_reductions(groups: Groups) -> None:
    first, second = Figures.drawn(0), Figures.drawn(1)
    found = reduce_statistics(Figures.drawn(groups.rank), groups.data)
    assert isinstance(found, Figures)
    assert found.to_metrics() == first.merge(second).to_metrics()
    assert Figures.drawn(groups.rank).to_metrics() == (first, second)[groups.rank].to_metrics()
    assert gather_over_data([groups.rank, "x"], groups) == [[0, "x"], [1, "x"]]
    assert from_last_stage(groups.rank, groups) == groups.rank


def check_uneven_parts(groups: Groups) -> None:
    """megatron-core gathers and scatters as many tokens as each rank has; 3 and 1 here."""
    from megatron.core.tensor_parallel import mappings

    distributed, sizes = mappings.torch.distributed, (3, 1)
    whole = torch.arange(8.0).view(4, 2)
    parts = [torch.empty(size, 2) for size in sizes]
    distributed.all_gather(parts, whole.split(sizes)[groups.rank].contiguous(), group=groups.data)
    assert torch.equal(torch.cat(parts), whole)
    output = torch.empty(sizes[groups.rank], 2)
    inputs = [part.contiguous() for part in (whole * (groups.rank + 1)).split(sizes)]
    distributed.reduce_scatter(output, inputs, group=groups.data)
    assert torch.equal(output, 3 * whole.split(sizes)[groups.rank])


def test_collectives_of_two_processes() -> None:
    prepare_megatron()
    launch(check_collectives, 2)
