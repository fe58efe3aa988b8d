"""Floating-point operations that a Qwen3 MoE needs, whatever a program spends on it. Torch-free.

Counted are matrix products, a multiplication and an addition as two operations. Norms, rotary embedding, softmax,
SwiGLU's elementwise part, sampling and the optimizer are left out: they grow with the hidden size, not with its square.
With h hidden size, H query heads, G key/value heads, d head size, E experts, K experts a token, f expert width and V
vocabulary, a forward pass costs

    a token, in each layer       2 h (H + 2 G) d + 2 H d h   queries, keys and values, and the output projection
                                 2 h E                       router
                                 K * 3 * 2 h f               gate, up and down projection of the K experts it goes to
    a visible pair, each layer   2 H d + 2 H d               query times key, probability times value
    a position with logits       2 h V                       LM head

so only active experts count. Attention is causal: the i-th token of a sequence sees i positions, n tokens make
n (n + 1) / 2 pairs; those who count the full square find up to twice the attention. A product's backward pass is two
products of its size, one for the gradient of each factor, so training costs three forward passes. Activations that are
computed anew do not count: these are the model FLOPs of MFU in PaLM, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gspo_moe.config.architecture import Architecture

TRAINING_PASSES = 3


@dataclass(frozen=True)
class Work:
    """What one or more passes bring to the model.

    tokens: that go through the layers. pairs: of a token and a position that it sees, itself included.
    logits: positions whose logits are needed.
    """

    tokens: int = 0
    pairs: int = 0
    logits: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.logits + other.logits)


def whole_sequences(lengths: Iterable[int], logits: int | None = None) -> Work:
    """One pass over sequences of these lengths: scoring, and the forward of training.

    logits: positions that need them, such as those of the responses; None for all.
    """
    work = sum((Work(length, _causal_pairs(length), length) for length in lengths), Work())
    return work if logits is None else replace(work, logits=logits)


def generation(prompt_length: int, response_lengths: Sequence[int]) -> Work:
    """Samples of one prompt with a KV cache: the prompt once for all of them, then token by token.

    The last token of a response is sampled but never fed.
    """
    work = Work(prompt_length, _causal_pairs(prompt_length), logits=1)
    for length in response_lengths:
        pairs = _causal_pairs(prompt_length + length - 1) - _causal_pairs(prompt_length)
        work += Work(length - 1, pairs, length - 1)
    return work


def forward_flops(architecture: Architecture, work: Work) -> dict[str, int]:
    """Operations of the forward passes that bring `work`, by part of the model."""
    hidden, layers = architecture.hidden_size, architecture.num_hidden_layers
    query = architecture.num_attention_heads * architecture.head_dim
    key_value = 2 * architecture.num_key_value_heads * architecture.head_dim
    expert = 3 * hidden * architecture.moe_intermediate_size
    return {
        "attention_projections": 2 * layers * work.tokens * hidden * (2 * query + key_value),
        "attention": 4 * layers * work.pairs * query,
        "router": 2 * layers * work.tokens * hidden * architecture.num_experts,
        "experts": 2 * layers * work.tokens * architecture.num_experts_per_tok * expert,
        "lm_head": 2 * work.logits * hidden * architecture.vocab_size,
    }


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2
