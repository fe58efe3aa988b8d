"""Runs a case through the torch ops on any device: the same grid and references for every build of the kernels."""

from __future__ import annotations

import numpy as np
import torch

from gspo_moe.kernels import ops
from tests.unit.kernels.cuda.formats import NAMES
from tests.unit.kernels.cuda.interface import FINISH, PARTIAL, Array, Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(case: Case, device: str) -> None:
    """Raises Mismatch for wrong results."""
    {"token_stats": _token_stats, "token_backward": _token_backward, "sequence_reduce": _sequence_reduce}[case.kernel](
        case, device
    )


def _token_stats(case: Case, device: str) -> None:
    logits = _logits(case, device)
    found = ops.token_stats(logits, _tensor(case, "targets_T", device), *_options(case), bool(case.numbers["entropy"]))
    case.check({"stats_TS": _array(found), "logits_TV": _stored(case, logits)})


def _token_backward(case: Case, device: str) -> None:
    logits = _logits(case, device)
    targets, log_z, grad = (_tensor(case, name, device) for name in ("targets_T", "log_z_T", "grad_log_probs_T"))
    grad_entropy, entropy = (
        _tensor(case, name, device) if name in case.buffers else None for name in ("grad_entropy_T", "entropy_T")
    )
    ops.token_backward_(logits, targets, log_z, grad, grad_entropy, entropy, *_options(case))
    case.check({"logits_TV": _stored(case, logits)})


def _sequence_reduce(case: Case, device: str) -> None:
    numbers, phases = case.numbers, int(case.numbers["phases"])
    num_tokens = case.buffers["mask_T"].data.size
    unread = torch.full((num_tokens,), torch.nan, device=device)
    both = [_tensor(case, name, device) if phases & PARTIAL else unread for name in ("log_probs_T", "old_log_probs_T")]
    pack = [*both, _tensor(case, "mask_T", device).bool(), _tensor(case, "cu_seqlens", device)]
    sums = ops.sequence_sums(*pack) if phases & PARTIAL else _tensor(case, "sums_N2", device)
    outputs = {"sums_N2": _array(sums)}
    if phases & FINISH:
        names = ("loss_N", "ratio_N", "clipped_tokens_N", "grad_log_probs_T")
        found = ops.sequence_reduce(
            *pack,
            _tensor(case, "advantages", device),
            bool(numbers["advantages_per_token"]),
            None if phases & PARTIAL else sums,
            *(numbers[name] for name in ("clip_low", "clip_high", "scale")),
        )
        outputs |= {name: _array(value) for name, value in zip(names, found, strict=True)}
    case.check(outputs)


def _options(case: Case) -> tuple[float, int, int]:
    numbers = case.numbers
    return numbers["inverse_temperature"], int(numbers["vocab_start"]), int(numbers["vocab"])


def _logits(case: Case, device: str) -> torch.Tensor:
    """[T, V] at the case's distance from a 16-byte boundary and with its stride."""
    buffer, numbers = case.buffers["logits_TV"], case.numbers
    dtype = DTYPES[NAMES[int(numbers["element_type"])]]
    given = torch.from_numpy(np.ascontiguousarray(buffer.data).view(np.uint8).copy())
    # The last row may end before its stride does.
    memory = torch.zeros(buffer.offset + len(given) + 16, dtype=torch.uint8, device=device)
    memory[buffer.offset : buffer.offset + len(given)] = given.to(device)
    tokens, columns = int(numbers["num_tokens"]), int(numbers.get("columns", numbers["vocab"]))
    whole = memory[buffer.offset :]
    whole = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
    return whole.as_strided((tokens, columns), (int(numbers["row_stride"]), 1))


def _stored(case: Case, logits: torch.Tensor) -> Array:
    """The memory that the case's buffer describes, after the op."""
    given = case.buffers["logits_TV"].data
    return _array(logits.as_strided((given.size,), (1,)).view(torch.uint8)).view(given.dtype)


def _tensor(case: Case, name: str, device: str) -> torch.Tensor:
    return torch.from_numpy(case.buffers[name].data.copy()).to(device)


def _array(tensor: torch.Tensor) -> Array:
    found: Array = tensor.cpu().numpy()
    return found
