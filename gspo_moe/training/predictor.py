"""The predictors of `routing.replay=predict`: one matrix a router, what it learns by, and how that is stored.

Every rank of a pipeline stage holds the stage's predictors whole, and alike. They are part of no model: nothing but
training's replay asks them, and an export does not have them.

Shape letters: L this pipeline stage's MoE layers, A all MoE layers, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gspo_moe.algorithms.statistics import Mergeable, Statistics
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model
from gspo_moe.model.sharded import OPTIMIZER, Shard, with_data
from gspo_moe.parallel.reduce import reduce_statistics
from gspo_moe.routing.prediction import Foretold, Lesson, PredictedPass, Predictors
from gspo_moe.routing.recorder import RoutePass, routers_of
from gspo_moe.routing.shards import StageLayers
from gspo_moe.routing.volatility import overlap_TL
from gspo_moe.training.optimizer_state import MOMENTS

if TYPE_CHECKING:
    from gspo_moe.training.packs import TrainingPack

STORED = ("weight", *MOMENTS)


class PredictorSums(Statistics):
    """By layer, [A]. kl, kl_unchanged: KL(rho || rho_hat) and KL(rho || rho_old) (nats), summed over tokens.

    rho_hat: by the W of that mini-batch; replayed is what the step's first W said.
    """

    def to_metrics(self) -> dict[str, float]:
        """Means over tokens and layers; none where no token was compared, as with answers of one token."""
        kl, unchanged, tokens = (self.sums[name].sum().item() for name in ("kl", "kl_unchanged", "tokens"))
        if not tokens:
            return {}
        return {"routing/predictor/kl": kl / tokens, "routing/predictor/kl_unchanged": unchanged / tokens}


class Predictor:
    """W [E, H] (float32) of each of this stage's routers, and Adam, with the policy's betas and neither decay nor clip.

    weights: in the order of the layers. Gradients are means over the sampled tokens of a mini-batch.
    """

    def __init__(self, config: Config, model: Model) -> None:
        routers = routers_of(model.chunks)
        layers = StageLayers(tuple(one.layer_number - 1 for one in routers), model.architecture, model.groups)
        self.weights = [torch.zeros_like(one.weight, dtype=torch.float32, requires_grad=False) for one in routers]
        self._predictors = Predictors(routers, self.weights, layers)
        self._factor = config.routing.predictor_lr_factor
        settings = config.optimizer
        self.adam = torch.optim.Adam(self.weights, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps)
        for weight in self.weights:
            moments = {name: torch.zeros_like(weight) for name in MOMENTS}
            self.adam.state[weight] = {"step": torch.tensor(0.0), **moments}

    @property
    def steps(self) -> int:
        """That Adam has taken."""
        return int(self.adam.state[self.weights[0]]["step"])

    def start(self, record: RoutePass | None, *, forced: bool) -> PredictedPass:
        """As `PredictedPass`."""
        return PredictedPass(self._predictors, record, forced=forced)

    def lesson(self, packs: Sequence[tuple[Foretold, torch.Tensor]], record: RoutePass | None) -> Lesson:
        """As `Lesson`."""
        return Lesson(self._predictors, record, packs)

    @torch.no_grad()
    def learn(self, lesson: Lesson, learning_rate: float) -> PredictorSums:
        """One step by what all ranks found; what they found at the weights before it. Collective.

        learning_rate: the policy's.
        """
        layers, sums_L3 = self._predictors.layers, lesson.sums_L3
        whole = torch.cat([gradient.flatten() for gradient in lesson.gradients])
        for group in _groups_with_other_rows(layers):
            dist.all_reduce(whole, group=group)
            dist.all_reduce(sums_L3, group=group)
        pieces = whole.split([weight.numel() for weight in self.weights])
        for weight, piece, tokens in zip(self.weights, pieces, sums_L3[:, 2], strict=True):
            weight.grad = piece.view_as(weight).div_(tokens.clamp(min=1))
        self.adam.param_groups[0]["lr"] = learning_rate * self._factor
        self.adam.step()
        self.adam.zero_grad()
        spread_A3 = layers.spread(sums_L3[None])[0]
        return PredictorSums(dict(zip(("kl", "kl_unchanged", "tokens"), spread_A3.unbind(dim=1), strict=True)), {})

    def shards(self, weights: Mapping[torch.nn.Parameter, Shard]) -> dict[str, dict[str, Shard]]:
        """What a checkpoint holds, and is read into; weights: `weight_shards`, whose routers' places these take."""
        found = {}
        for number, (router, own) in enumerate(self._predictors.pairs):
            shard = weights[router.weight]
            tensors = {"weight": own, **self.adam.state[own]}
            found[f"predictor {number}"] = {
                name: with_data(shard, tensors[name], key=f"{OPTIMIZER}predictor.{name}.{shard.key}") for name in STORED
            }
        return found

    def restore(self, found: Mapping[str, Mapping[str, torch.Tensor]], steps: int) -> None:
        """Puts what was read for `shards` in its place. steps: that Adam has taken."""
        for number, weight in enumerate(self.weights):
            tensors = {"weight": weight, **self.adam.state[weight]}
            for name in STORED:
                tensors[name].copy_(found[f"predictor {number}"][name])
            self.adam.state[weight]["step"] = torch.tensor(float(steps))

    def named(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each W by a name over all ranks; tensors: the model's by theirs."""
        own = {id(router.weight): weight for router, weight in self._predictors.pairs}
        return {f"predictor of {name}": own[id(one)] for name, one in tensors.items() if id(one) in own}

    def metrics(self, taught: Sequence[PredictorSums], packs: Sequence[TrainingPack]) -> dict[str, float]:
        """Of a step: what its updates taught, and its packs. Collective."""
        found = reduce(PredictorSums.merge, taught).to_metrics() if taught else {}
        kept, slots = self._kept(packs)
        return found | ({"routing/predictor/changed": 1.0 - kept / slots} if slots else {})

    def _kept(self, packs: Sequence[TrainingPack]) -> tuple[float, float]:
        """Expert slots of sampled tokens that were foretold as the router had them, and all slots. Collective."""
        layers, sums = self._predictors.layers, []
        for one in packs:
            assert one.replay_TLK is not None
            assert one.recording is not None
            routes_TLK, mask_T = one.replay_TLK, one.pack.route_mask_T
            kept_L = (overlap_TL(routes_TLK, one.recording.routes_TLK) * mask_T[:, None]).double().sum(dim=0)
            slots_L = torch.zeros_like(kept_L) + mask_T.sum() * routes_TLK.shape[2]
            sums.append(Mergeable({"kept": kept_L, "slots": slots_L}, {}))
        found = reduce_statistics(reduce(Mergeable.merge, sums), layers.groups.data)
        kept, slots = layers.spread(torch.stack(list(found.sums.values()))).sum(dim=1).tolist()
        return kept, slots


def _groups_with_other_rows(layers: StageLayers) -> list[dist.ProcessGroup]:
    """Those whose ranks route other tokens in the same layers."""
    groups = layers.groups
    return [groups.data_context, *([groups.tensor] if groups.layout.sequence_parallel else [])]
