"""The weights that a run begins with, in its policy and in the frozen reference of a KL penalty."""

from __future__ import annotations

from pathlib import Path

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.routing import RoutingConfig
from gspo_moe.config.schema import Config
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.sharded import load_stored_weights
from gspo_moe.model.verifying import check_export
from gspo_moe.model.weights import RandomSource, SafetensorsSource, load_weights
from gspo_moe.parallel.groups import Groups


def load_initial_weights(config: Config, model: Model) -> None:
    """Weights from `model.hf` or `model.checkpoint`, or random ones that are the same in every layout."""
    if config.model.hf is not None and not config.model.random_init:
        load_hf(model, Path(config.model.hf))
    elif config.model.checkpoint is not None:
        load_stored_weights(model, Path(config.model.checkpoint))
    else:
        load_weights(model, RandomSource(model.architecture, config.seed))


def load_hf(model: Model, folder: Path) -> None:
    """Weights from a Hugging Face folder, with a look at its checksums first where it has them. Collective.

    Raises DataError as `check_export` and `load_weights` do.
    """
    check_export(folder)
    load_weights(model, SafetensorsSource(folder))


def build_reference(config: Config, architecture: Architecture, groups: Groups, vocab: int) -> Model:
    """A second model, sharded as the policy is, without gradients or optimizer: `algorithm.kl.reference`, or the run's
    first weights, which are read from where the run read them, so that a resumed run has the same ones. Collective.

    Takes as much memory on each rank as the policy's own weights there in `model.dtype`.
    """
    # No routing options: they count or steer the policy's routers.
    routing = RoutingConfig(record=False, router_dtype=config.routing.router_dtype)
    config = config.model_copy(update={"routing": routing})
    model = build_model(config, architecture, groups, vocab=vocab)
    folder = config.algorithm.kl.reference
    if folder is not None:
        load_hf(model, Path(folder))
    else:
        load_initial_weights(config, model)
    for chunk in model.chunks:
        chunk.requires_grad_(False)
    return model
