"""A copy of the policy with the weights and the arithmetic of a production engine, for rollouts alone.

`rollout.numerics: bf16` runs weights, activations and KV cache in bfloat16, with products added up in float32, as vLLM
and SGLang do by default. `fp8_rounded` has, on top of that, the weights and inputs of the linear layers of attention
and experts rounded to FP8 (`rollout.embedded.fp8`), as an engine with block-quantised FP8 has them; like there, the
router, norms, embedding, output layer, attention and KV cache stay in bfloat16 (vLLM's models/qwen3_moe.py gives the
gate `quant_config=None`, layers/quantization/fp8.py takes linear layers and fused experts alone, and the embedding and
lm_head of Qwen3-30B-A3B-FP8 are not quantised). The rounding is simulated: products are bfloat16's.

Strategy: the copy is a second model in the policy's layout and layers, so that prefill and decode steps run through the
code that they always run through, and the policy's own forward stays as it is. Weights are rounded when they are
published, inputs of linear layers by hooks and, where a decode step leaves modules out, by `round_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gspo_moe.config.routing import RoutingConfig
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.experts import GroupedExperts
from gspo_moe.parallel.equality import row_hashes
from gspo_moe.platform import Backends, choose_backends
from gspo_moe.platform.backend import LAYERS
from gspo_moe.rollout.embedded.fp8 import round_activations, round_weight

RoundInputs = Callable[[torch.Tensor], torch.Tensor]


class RoundedCopy:
    """`model` is the copy; `round_inputs` is what its linear layers in FP8 do to their inputs, None without them."""

    def __init__(self, config: Config, policy: Model) -> None:
        """Of the policy's weights as they are. Takes 2 bytes a weight, see `planning.memory`."""
        self.model = build_model(_config_of_copy(config), policy.architecture, policy.groups, vocab=policy.vocab)
        self.round_inputs: RoundInputs | None = None
        self._rounded = set[int]()
        for chunk in self.model.chunks:
            chunk.requires_grad_(False)
        if config.rollout.numerics == "fp8_rounded":
            self.round_inputs = round_activations
            for linear in _linear_layers(self.model):
                self._rounded.add(id(linear.weight))
                linear.register_forward_pre_hook(_round_first)
        self.take(policy)

    @torch.no_grad()
    def take(self, policy: Model) -> None:
        """Rounds the policy's weights as they are now into the copy."""
        for _, copied, rounded in self._pairs(policy):
            copied.copy_(rounded)

    @torch.no_grad()
    def differing(self, policy: Model) -> list[str]:
        """Which of the copy's weights are not, to the bit, the policy's as they are now, rounded."""
        names, hashes = [], []
        for name, copied, rounded in self._pairs(policy):
            names.append(name)
            hashes.append(row_hashes(copied).sum() - row_hashes(rounded.to(copied)).sum())
        wrong = torch.stack(hashes).tolist()
        return list(dict.fromkeys(name for name, differs in zip(names, wrong, strict=True) if differs))

    def _pairs(self, policy: Model) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Of each of the copy's weights its name, itself and what it is to be, in whatever dtype."""
        for chunk, ours in zip(policy.gpt_chunks, self.model.gpt_chunks, strict=True):
            weights = dict(chunk.named_parameters())
            for name, copied in ours.named_parameters():
                if id(copied) not in self._rounded:
                    yield name, copied, weights[name]
                    continue
                # One matrix at a time: rounding takes some of them in float32.
                for one, source in zip(_matrices(copied), _matrices(weights[name]), strict=True):
                    yield name, one, round_weight(source)


def _matrices(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(-1, *weight.shape[-2:])


def rounded_copy(config: Config, policy: Model) -> RoundedCopy | None:
    """None where `rollout.numerics` is `trainer`: rollouts come from the policy itself."""
    return None if config.rollout.numerics == "trainer" else RoundedCopy(config, policy)


def check_numerics(config: Config, backends: Backends) -> None:
    """Raises ConfigError where `rollout.numerics` cannot be had of these layers."""
    if config.rollout.numerics == "fp8_rounded" and backends.experts.name != "local":
        raise ConfigError(
            "rollout.numerics=fp8_rounded rounds the inputs of our own experts, and Transformer Engine's are chosen "
            f"({backends.experts.why}); set model.backend.experts=local"
        )


def _config_of_copy(config: Config) -> Config:
    """In bf16 with the policy's own layers, and without routing options, which count or steer the policy's routers."""
    chosen = choose_backends(dict(config.model.backend), config.model.dtype)
    backend = config.model.backend.model_copy(update={part: getattr(chosen, part).name for part in LAYERS})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": "bf16", "backend": backend}),
            "routing": RoutingConfig(record=False, router_dtype=config.routing.router_dtype),
        }
    )


def _linear_layers(model: Model) -> Iterator[Any]:
    """Those that engines run in FP8, of this rank."""
    for gpt in model.gpt_chunks:
        for layer in gpt.decoder.layers:
            assert isinstance(layer.mlp.experts, GroupedExperts)
            attention, experts = layer.self_attention, layer.mlp.experts
            yield from (attention.linear_qkv, attention.linear_proj, experts.linear_fc1, experts.linear_fc2)


def _round_first(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_activations(inputs[0]), *inputs[1:])
