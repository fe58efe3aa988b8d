"""What `benchmark_kernels.py` compares: this project's log-probs and others'.

Shape letters: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from gspo_moe.kernels import token_log_probs
from tools.kernel_timing import Function


def log_softmax_gather(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_TV, dim=-1).gather(-1, targets_T[:, None])[:, 0]


def log_softmax_gather_fp32(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return log_softmax_gather(logits_TV.float(), targets_T)


def logsumexp_gather(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return logits_TV.gather(-1, targets_T[:, None])[:, 0] - logits_TV.logsumexp(dim=-1)


def cross_entropy(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits_TV, targets_T, reduction="none")


def trl_selective_log_softmax(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """TRL's formula: a row at a time, logsumexp for fp32 and log_softmax for 16 bits."""
    if logits_TV.dtype == torch.float32:
        log_sums_T = torch.stack([row_V.logsumexp(dim=-1) for row_V in logits_TV])
        return logits_TV.gather(-1, targets_T[:, None])[:, 0] - log_sums_T
    rows = zip(logits_TV, targets_T, strict=True)
    return torch.stack([torch.log_softmax(row_V, dim=-1)[target] for row_V, target in rows])


def liger_cross_entropy(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Liger's Triton kernel, which writes the gradient over the logits already in its forward pass."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    loss_T: torch.Tensor = LigerCrossEntropyFunction.apply(logits_TV, targets_T, None, -100, 0.0, 0.0, "none")[0]
    return -loss_T


def megatron_vocab_parallel(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return -vocab_parallel_cross_entropy(logits_TV[:, None], targets_T[:, None])[:, 0]


def ours(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return token_log_probs(logits_TV, targets_T).log_probs


PLAIN: dict[str, Function] = {
    "log_softmax_gather": log_softmax_gather,
    "logsumexp_gather": logsumexp_gather,
    "cross_entropy": cross_entropy,
}
TOKEN: dict[str, Function] = {
    "gspo_moe": ours,
    **PLAIN,
    "log_softmax_gather_fp32": log_softmax_gather_fp32,
    "trl_selective_log_softmax": trl_selective_log_softmax,
    "megatron_vocab_parallel": megatron_vocab_parallel,
}


def eager_linear(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return log_softmax_gather(F.linear(hidden_TH, weight_VH), targets_T)


def eager_linear_fp32(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return log_softmax_gather(F.linear(hidden_TH, weight_VH).float(), targets_T)


def liger_chunked(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """What Liger's fused linear policy losses take log-probs with; of its package, the part without Triton."""
    from liger_kernel.chunked_loss import fused_linear_ppo as liger

    found: torch.Tensor = liger._ChunkedSelectiveLogProbFunction.apply(
        hidden_TH, weight_VH, targets_T, None, 1.0, liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    )
    return found


def token_implementations(on_gpu: bool, compiled: bool) -> dict[str, Function]:
    """Log-probs from logits [T, V], by name; Liger's kernel is Triton's, hence a GPU's."""
    found = dict(TOKEN)
    if compiled:
        found |= {f"compile_{name}": torch.compile(function) for name, function in PLAIN.items()}
    if on_gpu and importlib.util.find_spec("liger_kernel") is not None:
        found["liger_cross_entropy"] = liger_cross_entropy
    return found


def linear_implementations(ours_linear: Function) -> dict[str, Function]:
    """Log-probs from hidden states [T, H] and output weight [V, H], by name."""
    found: dict[str, Function] = {"gspo_moe": ours_linear, "eager": eager_linear, "eager_fp32": eager_linear_fp32}
    if importlib.util.find_spec("liger_kernel") is not None:
        found["liger_chunked"] = liger_chunked
    return found
