"""Fused kernels from logits, or hidden states, to the log-probs of sequences; PyTorch operators where none is built."""

from gspo_moe.kernels.layers import has_layer_kernels, rms_norm, rotary
from gspo_moe.kernels.library import Kernels, kernels
from gspo_moe.kernels.linear import VocabShard, linear_token_log_probs
from gspo_moe.kernels.sequences import SequenceLoss, sequence_reduce
from gspo_moe.kernels.tokens import TokenLogProbs, token_log_probs

__all__ = [
    "Kernels",
    "SequenceLoss",
    "TokenLogProbs",
    "VocabShard",
    "has_layer_kernels",
    "kernels",
    "linear_token_log_probs",
    "rms_norm",
    "rotary",
    "sequence_reduce",
    "token_log_probs",
]
