"""Products, attention, experts and draws of decode steps on the CPU in float32, by compiled kernels of few rows.

There is no PyTorch form here: `rollout.embedded.arithmetic` and `sampling` have it, for every device, and ask `suits`
which to take. Products read weights in panels (`pack`), an order of their own that is made once for many steps.

Shape letters: N tokens, H inputs, O outputs, J panels of C = 16 outputs, V words, G key heads, X a key head's query
heads, its key and its value, D head size, B rows of a cache, P its positions, K experts a token, E experts here, F
their width.
"""

from __future__ import annotations

from typing import Any

import torch

from gspo_moe.kernels.library import kernels

_SCHEMAS = (
    "decode_norm(Tensor values, Tensor weight, float epsilon) -> Tensor",
    "decode_pack(Tensor weight) -> Tensor",
    "decode_linear(Tensor values, Tensor panels, int outputs) -> Tensor",
    "decode_draw(Tensor logits, Tensor uniforms, float temperature) -> (Tensor, Tensor)",
    "decode_attention(Tensor qkv, Tensor query_norm, Tensor key_norm, float epsilon, Tensor cosines, Tensor sines, "
    "Tensor positions, Tensor(a!) keys, Tensor(b!) values) -> Tensor",
    "decode_experts(Tensor values, Tensor shares, Tensor routes, Tensor first_layer, Tensor second_layer, int start) "
    "-> Tensor",
)
# Without the autograd layer of torch.library.custom_op, which costs a call as much as a small product.
_LIBRARY = torch.library.Library("gspo_moe", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
kernels()
_OPS: Any = torch.ops.gspo_moe


def suits(weight: torch.Tensor) -> bool:
    """Whether kernels are built for a model with such weights."""
    return kernels().cpu is not None and weight.device.type == "cpu" and weight.dtype == torch.float32


def norm(values_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm, [N, H]."""
    found: torch.Tensor = _OPS.decode_norm(values_NH, weight_H, epsilon)
    return found


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The panels [..., J, H, C] of weights [..., O, H], the last ones filled up with zeros."""
    panels: torch.Tensor = _OPS.decode_pack(weight)
    return panels


def linear(values_NH: torch.Tensor, panels_JHC: torch.Tensor, outputs: int) -> torch.Tensor:
    """values @ weight.T, [N, O], of the weight's panels; outputs: O."""
    found: torch.Tensor = _OPS.decode_linear(values_NH, panels_JHC, outputs)
    return found


def draw(logits_NV: torch.Tensor, uniforms_N: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N] (int64) and their log-probs [N], as `rollout.embedded.sampling.sample` without truncation."""
    tokens_N, log_probs_N = _OPS.decode_draw(logits_NV, uniforms_N, temperature)
    return tokens_N, log_probs_N


def attention(
    qkv_NGXD: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    epsilon: float,
    factors: tuple[torch.Tensor, torch.Tensor],
    positions_N: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Attention [N, G (X - 2) D] of token n to row n of the cache up to itself, whose key and value are put there.

    norms: of queries and keys, [D]. factors: rotary cosines and sines [P, D]. positions_N: int64.
    cache: keys and values [B, G, P, D].
    """
    found: torch.Tensor = _OPS.decode_attention(qkv_NGXD, *norms, epsilon, *factors, positions_N, *cache)
    return found


def experts(
    values_NH: torch.Tensor,
    shares_NK: torch.Tensor,
    routes_NK: torch.Tensor,
    first_EJHC: torch.Tensor,
    second_EJFC: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """The sum [N, H] over each token's experts from `start` to `start` + E of their share times SwiGLU, in their order.

    shares_NK: gate weights, float32. routes_NK: int64; those of other experts count nothing.
    first_EJHC, second_EJFC: panels of weights [E, 2 F, H] and [E, H, F].
    """
    found: torch.Tensor = _OPS.decode_experts(values_NH, shares_NK, routes_NK, first_EJHC, second_EJFC, start)
    return found
