"""The section `routing`: what is measured of the router, Routing Replay, the router's own loss. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gspo_moe.section import Section


class RoutingConfig(Section):
    """Routing measurements (SPEC sections 4 and 5), Routing Replay (section 6) and the router's own loss.

    record: staleness and load, every step. engine_routes: the rollout engine reports its routes; r3 implies it.
    replay: r2 replays the old-log-prob pass's routes, recall those with their gate weights, r3 the rollout engine's,
        predict those that predictors foretell for the updates to come (arXiv 2606.00395).
    predictor_lr_factor: learning rate of these predictors over that of the policy.
    replay_margin: r2 and recall replay a token's layer only where its margin p_(K) - p_(K+1) was below; null for all.
    audit: what the first fault does that a step's replay shows: ends the run, is logged, or is not looked for.
    frozen_router: router weights get no update.
    probe_interval: steps between measurements of one update's effect on `probe_sequences` fixed sequences, 0 for none.
    attribution: splits the last mini-batch's log-ratios every `attribution_interval` steps, on `attribution_sequences`
        of its sequences; with `attribution_by_depth` also with the routes of the first l layers held, for each l.
    aux_loss_coeff: 0 for RL unless chosen.
    """

    record: bool = True
    engine_routes: bool = False
    replay: Literal["none", "r2", "r3", "recall", "predict"] = "none"
    predictor_lr_factor: PositiveFloat = 1e3
    replay_margin: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    audit: Literal["error", "warn", "off"] = "error"
    frozen_router: bool = False
    probe_interval: NonNegativeInt = 0
    probe_sequences: PositiveInt = 64
    attribution: bool = False
    attribution_interval: PositiveInt = 1
    attribution_sequences: Annotated[int, Field(ge=2)] = 64
    attribution_by_depth: bool = False
    aux_loss_coeff: NonNegativeFloat = 0.0
    router_dtype: Literal["model", "fp32", "fp64"] = "model"

    @property
    def reports_engine_routes(self) -> bool:
        return self.engine_routes or self.replay == "r3"

    @property
    def replays_old_pass(self) -> bool:
        return self.replay in ("r2", "recall", "predict")

    def faults(self) -> Iterator[str]:
        if self.replay == "recall" and not self.frozen_router:
            yield (
                "routing.replay=recall holds the gate weights, through which alone a router learns; set "
                "routing.frozen_router=true, or replay=r2, which holds the experts only"
            )
        if self.replay_margin is not None and self.replay not in ("r2", "recall"):
            yield (
                f"routing.replay_margin={self.replay_margin:g} chooses by the margins of the old-log-prob pass's own "
                f"routes, which routing.replay={self.replay} does not replay; set replay=r2 or recall, or leave it out"
            )
        needing = {
            f"routing.replay={self.replay}": self.replays_old_pass,
            "routing.engine_routes=true": self.engine_routes,
            f"routing.probe_interval={self.probe_interval}": self.probe_interval > 0,
            "routing.attribution=true": self.attribution,
        }
        for setting, is_set in needing.items():
            if is_set and not self.record:
                yield f"{setting} needs the recorder; set routing.record=true, or turn it off"
