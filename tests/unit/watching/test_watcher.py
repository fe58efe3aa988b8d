"""What is taken down of transformers' routers, against float64 logits of what each router was given."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import gspo_moe
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.watching import Probe, Watcher, compare, join
from gspo_moe.watching.routers import TopKRouter
from gspo_moe.watching.texts import Batch
from gspo_moe.watching.trl import RoutingCallback
from tests.families import FAMILIES, tiny, tokens

ROOT = Path(__file__).parents[3]
IDS, ATTENTION, RESPONSE = tokens()
# Of the response, with a token behind it.
COUNTED = (RESPONSE[:, :-1].bool() & ATTENTION[:, 1:].bool()).flatten()


def routers(model: Any) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".mlp.router"))]


def expected(model: Any, family: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts [T, L, K] in order of their ids, margins [T, L] and ln scores [T, L, E] of all tokens, in float64."""
    given: list[torch.Tensor] = []
    handles = [one.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0])) for one in routers(model)]
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=ATTENTION)
    for handle in handles:
        handle.remove()
    state = model.state_dict().items()
    biases = [value.flatten() for name, value in state if name.endswith("e_score_correction_bias")]
    pairs = zip(routers(model), given, biases or [torch.zeros(8)] * len(given), strict=True)
    layers = [_layer(router, hidden, bias, family) for router, hidden, bias in pairs]
    routes, margins, scores = (torch.stack([layer[part] for layer in layers], dim=1) for part in range(3))
    return routes, margins, scores


def _layer(
    router: Any, hidden: torch.Tensor, bias: torch.Tensor, family: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = hidden.detach().double().reshape(-1, 32) @ router.weight.detach().double().T
    if family == "GptOss":
        logits = logits + router.bias.detach().double()
    scores = logits.softmax(1) if FAMILIES[family][1] == "softmax" else 1 / (1 + (-logits).exp())
    choice = scores + bias
    if family.startswith("Deepseek"):  # two of four groups first: by their best expert, or by their best two
        in_groups = choice.view(-1, 4, 2)
        groups = in_groups.max(2).values if family == "DeepseekV2" else in_groups.sum(2)
        left_out = groups < groups.sort(dim=1).values[:, -2:-1]
        choice = in_groups.masked_fill(left_out[:, :, None], -torch.inf).view(-1, 8)
    best, experts = choice.sort(dim=1, descending=True)
    routes = experts[:, :2].sort(dim=1).values
    rival = best[:, 2]
    if family.startswith("Deepseek"):  # a group of which nothing was picked does not count
        seen = torch.stack([(routes // 2 == group).any(1) for group in range(4)], dim=1).repeat_interleave(2, dim=1)
        picked = torch.zeros_like(seen).scatter(1, routes, True)
        rival = choice.masked_fill(~seen | picked, -torch.inf).max(1).values
        rival = torch.where(rival.isinf(), 0.0, rival)
    return routes, best[:, 1] - rival, scores.log()


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_margins_and_scores_are_those_of_float64(family: str) -> None:
    model = tiny(family)
    found = gspo_moe.watch(model).snapshot(IDS, ATTENTION, RESPONSE)
    routes, margins, scores = expected(model, family)
    assert torch.equal(found.routes_TLK.long().sort(dim=2).values, routes)
    kept = torch.nn.functional.pad(COUNTED.view(3, 9), (0, 1)).flatten()
    assert torch.equal(found.masks.routes_T, kept)
    assert found.margin_ML is not None
    assert found.log_scores_MLE is not None
    torch.testing.assert_close(found.margin_ML.double(), margins[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.log_scores_MLE.double(), scores[kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_routes_are_weighed_as_the_router_weighs_its_own(family: str) -> None:
    model = tiny(family)
    watcher = gspo_moe.watch(model)
    own = watcher.snapshot(IDS, ATTENTION, RESPONSE)
    foreign_TLK = own.routes_TLK.flip(0).flip(2)
    held = watcher.snapshot(IDS, ATTENTION, RESPONSE, routes=foreign_TLK)
    assert torch.equal(held.routes_TLK, foreign_TLK)
    again = watcher.snapshot(IDS, ATTENTION, RESPONSE, routes=own.routes_TLK)
    assert own.log_probs_T is not None
    assert again.log_probs_T is not None
    assert held.log_probs_T is not None
    torch.testing.assert_close(again.log_probs_T, own.log_probs_T, atol=1e-4, rtol=0)
    assert (held.log_probs_T - own.log_probs_T).abs().max() > 0.1


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3", "GptOss", "MiniMaxM2"])
def test_a_gate_is_found_in_bf16_too(family: str) -> None:
    found = gspo_moe.watch(tiny(family).bfloat16()).snapshot(IDS, ATTENTION, RESPONSE, log_probs=False)
    assert found.log_scores_MLE is not None
    total_ML = found.log_scores_MLE.exp().sum(dim=2)
    assert bool(((total_ML - 1).abs() < 1e-5).all()) is (FAMILIES[family][1] == "softmax")


@pytest.mark.parametrize("normalised", [True, False])
def test_held_routes_are_the_models_own_with_another_choice(normalised: bool) -> None:
    model = tiny("Qwen3Moe", norm_topk_prob=normalised)
    watcher = gspo_moe.watch(model)
    own = watcher.snapshot(IDS, ATTENTION)
    routes = own.routes_TLK.long().add(3).remainder(8)
    held = watcher.snapshot(IDS, ATTENTION, routes=routes)

    for index, router in enumerate(routers(model)):

        def forward(hidden: torch.Tensor, router: Any = router, index: int = index) -> tuple[torch.Tensor, ...]:
            logits = hidden.reshape(-1, 32) @ router.weight.T
            weights = logits.softmax(1).gather(1, routes[:, index])
            return logits, weights / weights.sum(1, keepdim=True) if normalised else weights, routes[:, index]

        router.forward = forward
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=ATTENTION).logits
    reference = logits[:, :-1].double().log_softmax(2).gather(2, IDS[:, 1:, None])[..., 0]
    assert held.log_probs_T is not None
    torch.testing.assert_close(held.log_probs_T.view(3, 10)[:, :-1].double(), reference, atol=1e-5, rtol=0)


def test_a_trainers_own_forward_is_captured_and_its_recomputation_is_not() -> None:
    model = tiny("Qwen3Moe")
    watcher = gspo_moe.watch(model)
    alone = watcher.snapshot(IDS, ATTENTION, RESPONSE)
    model.train()
    model.model.layers[0].eval()
    watcher.snapshot(IDS, ATTENTION, RESPONSE)
    assert [layer.training for layer in model.model.layers] == [False, True]
    model.train()
    model.gradient_checkpointing_enable()
    with watcher.capture(ATTENTION, RESPONSE) as captured:
        loss = model(input_ids=IDS, attention_mask=ATTENTION, labels=IDS).loss
    loss.backward()
    found = captured.snapshot()
    assert torch.equal(found.routes_TLK, alone.routes_TLK)
    assert torch.equal(found.routes_MLK, alone.routes_MLK)
    assert model.training


def test_snapshots_of_micro_batches_join() -> None:
    model = tiny("Olmoe")
    watcher = gspo_moe.watch(model)
    whole = watcher.snapshot(IDS, ATTENTION, RESPONSE)
    joined = join([watcher.snapshot(IDS[rows], ATTENTION[rows], RESPONSE[rows]) for rows in ([0], [1, 2])])
    assert torch.equal(joined.routes_TLK, whole.routes_TLK)
    assert torch.equal(joined.masks.row_T, whole.masks.row_T)
    assert joined.log_scores_MLE is not None
    assert whole.log_scores_MLE is not None
    torch.testing.assert_close(joined.log_scores_MLE, whole.log_scores_MLE)


class OldBlock(torch.nn.Module):
    """transformers 4's form: the gate is a linear layer, and the block takes the top k."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 8, 2
        self.gate = torch.nn.Linear(32, 8, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.gate(hidden).sum()


def test_a_linear_gate_is_read_by_its_softmax() -> None:
    block = OldBlock()
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    watcher = gspo_moe.watch(torch.nn.Sequential(block))
    with watcher.capture(torch.ones(2, 5)) as captured:
        block(hidden)
    found = captured.snapshot()
    probs = (hidden.double().flatten(0, 1) @ block.gate.weight.detach().double().T).softmax(1)
    best, experts = probs.sort(dim=1, descending=True)
    assert torch.equal(found.routes_TLK[:, 0].long(), experts[:, :2])
    assert found.margin_ML is not None
    torch.testing.assert_close(found.margin_ML[:, 0].double(), (best[:, 1] - best[:, 2])[found.masks.routes_T])
    with (
        pytest.raises(ConfigError, match="use transformers >= 5"),
        watcher.capture(torch.ones(2, 5), routes=found.routes_TLK),
    ):
        block(hidden)

    block.moe_statics = torch.nn.Identity()  # Ernie's, with a bias for the choice
    with pytest.raises(ConfigError, match="no router of a known form"):
        gspo_moe.watch(block)


def with_output(model: Any, change: Callable[..., tuple[torch.Tensor, ...]]) -> Any:
    """The model, whose routers give what `change` makes of their logits, weights and experts."""
    for router in routers(model):
        plain: Any = router.forward
        router.forward = functools.partial(lambda plain, *given: change(*plain(*given)), plain)
    return model


def test_a_router_that_gives_probabilities_is_read_by_their_log() -> None:
    """transformers 5's first ones."""
    plain = gspo_moe.watch(tiny("Mixtral")).snapshot(IDS, ATTENTION)
    model = with_output(tiny("Mixtral"), lambda logits, *rest: (logits.softmax(1), *rest))
    found = gspo_moe.watch(model).snapshot(IDS, ATTENTION, routes=plain.routes_TLK)
    assert plain.log_scores_MLE is not None
    assert found.log_scores_MLE is not None
    torch.testing.assert_close(found.log_scores_MLE, plain.log_scores_MLE, atol=1e-5, rtol=0)


def test_a_gate_is_that_of_real_tokens_and_of_the_first_forward() -> None:
    padding = ~ATTENTION.bool().flatten()[:, None]
    model = with_output(tiny("MiniMaxM2"), lambda a, weights, b: (a, weights.masked_fill(padding, 7.0), b))
    watcher = gspo_moe.watch(model)
    first = watcher.snapshot(IDS, ATTENTION)
    assert first.scored_by == ("sigmoid", "sigmoid")
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_()  # type: ignore[operator]
    tied = watcher.snapshot(IDS, ATTENTION)
    assert tied.scored_by == first.scored_by
    compare(first, tied)
    other = gspo_moe.watch(model).snapshot(IDS, ATTENTION)
    assert other.scored_by == ("softmax", "softmax")
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.gate: its weights fit sigmoid in one snapshot, softmax in"):
        compare(first, other)
    with pytest.raises(DataError, match="join those of one watcher"):
        join([first, other])


def test_what_cannot_be_watched_is_an_error_with_its_fix() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no router of a known form \(nothing is called one\)"):
        gspo_moe.watch(torch.nn.Linear(2, 2))
    watcher = gspo_moe.watch(tiny("Mixtral"))
    with pytest.raises(DataError, match="saw 30 tokens, the mask has 3 rows of 9"):
        watcher.snapshot(IDS, ATTENTION[:, :9])
    with watcher.capture(ATTENTION):
        watcher._model(input_ids=IDS)
        with pytest.raises(DataError, match="ran twice"):
            watcher._model(input_ids=IDS)
    with watcher.capture(ATTENTION) as captured:
        pass
    with pytest.raises(DataError, match=r"model\.layers\.0\.mlp\.gate did not run"):
        captured.snapshot()
    with pytest.raises(DataError, match="no token counts"):
        watcher.snapshot(IDS[:, :1])


def test_a_router_of_an_unknown_rule_has_routes_alone() -> None:
    model = tiny("Mixtral")
    watcher = Watcher(model)
    router = next(iter(watcher._routers.values()))
    assert isinstance(router, TopKRouter)
    plain = router.module.forward
    router.module.forward = lambda hidden: (plain(hidden)[0], plain(hidden)[1] ** 2, plain(hidden)[2])
    found = watcher.snapshot(IDS, ATTENTION)
    assert found.log_scores_MLE is None
    assert found.margin_ML is None
    with pytest.raises(ConfigError, match="its weights follow no rule known here"):
        watcher.snapshot(IDS, ATTENTION, routes=found.routes_TLK)
    callback = RoutingCallback(watcher, Batch(IDS, ATTENTION, RESPONSE), 1, attribution=True)
    with pytest.raises(ConfigError, match=r"or log_routing\(\.\.\., attribution=False\)"):
        callback.on_train_begin(None, None, None, model=model)


def test_nothing_of_the_trainer_is_imported() -> None:
    program = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "pydantic", "yaml", "psutil", "tensorboard", "pebble", "rich", "plotly"):
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
from gspo_moe import watch
import gspo_moe.cli
from gspo_moe.watching import compare, join
gspo_moe.cli._parser()
trainer = {"training", "model", "config", "platform", "parallel", "kernels"}
light = {"gspo_moe.parallel", "gspo_moe.parallel.signals"}  # of the command line, from the standard library alone
found = {name for name in sys.modules if name.startswith("gspo_moe.") and name.split(".")[1] in trainer}
print(sorted(found - light))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("version", [1, 2])
def test_hooks_hold_in_a_model_that_fsdp_wraps(version: int) -> None:
    plain, model = tiny("Qwen3Moe"), tiny("Qwen3Moe")
    wrapped: torch.nn.Module = model
    if version == 1:
        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    else:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    models = plain, wrapped
    watchers = [gspo_moe.watch(one) for one in models]
    probes = [Probe(one, IDS) for one in models]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.5) for one in models]
    old = watchers[0].snapshot(IDS, ATTENTION, RESPONSE, use_cache=False)
    for step in range(2):
        figures = [probe.measure(use_cache=False) for probe in probes]
        assert figures[1] == pytest.approx(figures[0], abs=1e-5)
        assert step == 0 or figures[0]["routing/update/slot_change"] > 0
        for routes in (None, old.routes_TLK.roll(step, dims=0)):
            found = [one.snapshot(IDS, ATTENTION, RESPONSE, routes=routes, use_cache=False) for one in watchers]
            assert torch.equal(found[0].routes_TLK, found[1].routes_TLK)
            assert found[0].log_probs_T is not None
            assert found[1].log_probs_T is not None
            torch.testing.assert_close(found[0].log_probs_T, found[1].log_probs_T, atol=1e-5, rtol=0)
        for one, optimizer in zip(models, optimizers, strict=True):
            one(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 3].mean().neg().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_probe_tells_what_two_snapshots_of_this_ranks_part_do() -> None:
    class FirstHalf(torch.nn.Module):
        """Half of the tokens reach this rank's routers."""

        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("Qwen3Moe")

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids[:, :4], use_cache=False)

    model, ids = FirstHalf().train(), IDS[:, :8]
    probe, watcher = Probe(model, ids, parts=2), gspo_moe.watch(model.model)
    assert probe.measure() == {}
    old = watcher.snapshot(ids[:, :4])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    expected = compare(old, watcher.snapshot(ids[:, :4])).figures("update").metrics
    found = probe.measure()
    assert found["routing/update/slot_change"] > 0
    assert found == {name: expected[name] for name in found}
    assert not any("log_prob" in name for name in found)
    assert model.training
    assert model.model.training
    with pytest.raises(ConfigError, match="multiple of 3"):
        Probe(model, ids, parts=3)
