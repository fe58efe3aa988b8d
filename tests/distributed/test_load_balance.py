"""The auxiliary loss, the logged expert load and padding, against transformers' router in float64, in every layout.

Advantages are zero, so what gradient there is comes from the auxiliary loss alone.

Shape letters: T tokens of a pack, A MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_moe.config.schema import Config
from gspo_moe.model.hf import whole_tensors
from gspo_moe.model.weights import SafetensorsSource
from gspo_moe.parallel.reduce import reduce_statistics
from gspo_moe.routing import LoadSums, expert_load
from gspo_moe.routing.comparison import expert_load_of
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.types import Microbatch, TrainingSample
from tests.experts import TokensSeen
from tests.launch import launch
from tests.policy import packs_of, trained
from tests.qwen3 import architecture, layout, random_sequences, reference_model
from tests.steps import train_minibatch

SIZES = architecture(num_experts=8, num_hidden_layers=2)
COEFFICIENT = 0.1
# Two sequences a pack: 11, 18, 5 and 27 tokens, which sequence parallelism, context parallelism and the allgather
# dispatcher have to pad.
LENGTHS = (9, 4, 14, 6, 2, 5, 21, 8)
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"expert": 2},
    {"expert": 2, "dispatcher": "allgather"},
    {"tensor": 2},
    {"tensor": 2, "expert": 2, "expert_tensor": 1, "dispatcher": "allgather"},
    {"pipeline": 2},
    {"context": 2},
    {"context": 2, "expert": 2, "dispatcher": "allgather"},
]


def packs() -> list[Microbatch]:
    sequences = random_sequences(SIZES, LENGTHS, seed=12)
    return packs_of([sample(tuple(ids.tolist())) for ids in sequences], per_pack=2)


def sample(token_ids: tuple[int, ...]) -> TrainingSample:
    return TrainingSample(token_ids, (0,) + (1,) * (len(token_ids) - 1))


def repeated(pack: Microbatch, times: int) -> Microbatch:
    """A pack of the same sequences over and over."""
    bounds, ids = pack.cu_seqlens.tolist(), pack.input_ids_T.tolist()
    last = pack.target_ids_T[pack.cu_seqlens[1:] - 1].tolist()
    sequences = [(*ids[a:b], end) for a, b, end in zip(bounds, bounds[1:], last, strict=False)] * times
    return packs_of([sample(token_ids) for token_ids in sequences], per_pack=len(sequences))[0]


class Reference:
    """transformers' model in float64; the loss of Switch Transformer (arXiv 2101.03961, eq. 4-6) on its routers."""

    def __init__(self, folder: Path) -> None:
        self.model = reference_model(SIZES)
        self.model.save_pretrained(folder)
        self.model.double().set_experts_implementation("eager")  # grouped products have no float64
        self._logits: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda gate, inputs, _: self._logits.append(F.linear(inputs[0].flatten(0, -2), gate.weight))
            )

    def logits(self, pack: Microbatch) -> list[torch.Tensor]:
        """Of each layer's router, [T, E]."""
        by_sequence = []
        for ids in pack.input_ids_T.split(pack.cu_seqlens.diff().tolist()):
            self._logits.clear()
            self.model(input_ids=ids[None])
            by_sequence.append(list(self._logits))
        return [torch.cat(layer) for layer in zip(*by_sequence, strict=True)]

    def gradients(self, microbatches: Sequence[Microbatch]) -> dict[str, torch.Tensor]:
        """Of coefficient * E * sum_e f_e P_e, summed over layers and averaged over the micro-batches."""
        self.model.zero_grad()
        for pack in microbatches:
            for logits_TE in self.logits(pack):
                share_E = F.one_hot(logits_TE.topk(SIZES.num_experts_per_tok).indices, SIZES.num_experts)
                share_E = share_E.double().mean(dim=(0, 1))
                loss = COEFFICIENT * SIZES.num_experts * (share_E * logits_TE.softmax(dim=1).mean(dim=0)).sum()
                (loss / len(microbatches)).backward(retain_graph=True)
        found = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {name: value.clone() for name, value in found.items() if value is not None}

    @torch.no_grad()
    def load(self, microbatches: Sequence[Microbatch]) -> torch.Tensor:
        """Tokens by layer and expert, [A, E]."""
        total = torch.zeros(SIZES.num_hidden_layers, SIZES.num_experts, dtype=torch.int64)
        for pack in microbatches:
            routes = torch.stack([logits_TE.topk(SIZES.num_experts_per_tok).indices for logits_TE in self.logits(pack)])
            total += expert_load(routes.transpose(0, 1), SIZES.num_experts)
        return total


def fused(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one, as they are on disk, put together as transformers holds them in memory."""
    found = {name: value for name, value in gradients.items() if ".experts." not in name}
    for layer in range(SIZES.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([gradients[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(SIZES.num_experts)])
            for kind in ("gate", "up", "down")
        )
        found |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return found


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: object) -> None:
    """Tensor by tensor; the last layer's experts and the output layer lie behind every router and get nothing."""
    assert sum(bool(value.any()) for value in expected.values()) > 15
    for name, value in found.items():
        theirs = expected.get(name, torch.zeros_like(value))
        assert (value - theirs).norm() <= 1e-5 * theirs.norm(), f"{what}: {name}"


def config(coefficient: float = COEFFICIENT, **parallel: str) -> Config:
    return Config.model_validate(
        {"routing": {"aux_loss_coeff": coefficient}, "parallel": parallel, "optimizer": {"clip_grad": 0.0}}
    )


def gradient(parameter: Any) -> torch.Tensor:
    reduced: torch.Tensor = parameter.main_grad
    return reduced


def observe(microbatches: list[Microbatch], folder: Path, config: Config, world: int = 1, **parallel: int) -> Any:
    """Gradients (whole, on the first rank), tokens that each expert received over all ranks, and the logged load."""
    with trained(config, layout(world, **parallel), SIZES, SafetensorsSource(folder)) as (model, optimizer):
        groups = model.groups
        share = len(microbatches) // groups.data.size()
        mine = microbatches[groups.data_rank * share : (groups.data_rank + 1) * share]
        old = [torch.zeros(pack.num_tokens) for pack in mine]
        recorder, seen = RouteRecorder(model.chunks, SIZES, groups), TokensSeen(model)
        result = train_minibatch(model, optimizer, mine, old, config.algorithm, 2 * len(microbatches), 1.0, recorder)
        gradients = {name: value.clone() for name, value in whole_tensors(model, gradient)}
        recorded = LoadSums.from_load(expert_load_of(result.routes, recorder.layers))
        load = reduce_statistics(recorded, groups.data).to_metrics()
        dist.all_reduce(seen.load)
        return fused(gradients) if gradients else {}, seen.load, load


def check_layouts(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt")
    for keys in LAYOUTS:
        parallel = {**keys}
        more = {"dispatcher": parallel.pop("dispatcher")} if "dispatcher" in parallel else {}
        gradients, seen, load = observe(packs(), folder, config(**more), world=2, **parallel)
        if gradients:
            agree(gradients, expected["gradients"], keys)
        assert load == pytest.approx(expected["metrics"], rel=1e-12), keys
        copies = parallel.get("expert_tensor", parallel.get("tensor", 1))  # ranks that each have a part of an expert
        assert torch.equal(seen, copies * expected["load"]), keys


def test_no_layout_changes_the_auxiliary_loss_or_the_load(tmp_path: Path) -> None:
    reference = Reference(tmp_path)
    load = reference.load(packs())
    expected = {
        "gradients": reference.gradients(packs()),
        "load": load,
        "metrics": LoadSums.from_load(load).to_metrics(),
    }
    torch.save(expected, tmp_path / "expected.pt")
    launch(check_layouts, 2, tmp_path)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_the_auxiliary_loss_is_that_of_each_micro_batch_on_average(
    recompute: str, dispatcher: str, tmp_path: Path
) -> None:
    reference = Reference(tmp_path)
    gradients, _, _ = observe(packs(), tmp_path, config(recompute=recompute, dispatcher=dispatcher))
    agree(gradients, reference.gradients(packs()), dispatcher)


def test_its_scale_depends_on_neither_number_nor_size_of_micro_batches(tmp_path: Path) -> None:
    expected = Reference(tmp_path).gradients(packs())
    more, larger = [pack for pack in packs() for _ in range(3)], [repeated(pack, 3) for pack in packs()]
    for microbatches in (more, larger):
        gradients, _, _ = observe(microbatches, tmp_path, config())
        agree(gradients, expected, len(microbatches))


def test_there_is_none_unless_chosen(tmp_path: Path) -> None:
    Reference(tmp_path)
    assert Config().routing.aux_loss_coeff == 0
    gradients, _, _ = observe(packs(), tmp_path, Config())
    assert not any(value.any() for value in gradients.values())
