"""Times the log-prob kernels against what others do, on this CPU: medians of interleaved runs, and peak extra memory.

    python tools/benchmark_kernels.py --tokens 2048 --vocab 151936 --threads 2 --json kernels.json

Rows: op, dtype, pass (forward, or forward_backward), implementation, seconds and cpu_seconds (medians; the second is of
all threads), extra_bytes (peak resident memory beyond inputs and main_grad). On a machine that others use, seconds
measure them too; CPU seconds do not under OMP_WAIT_POLICY=passive, without which threads spin while they wait.

Every implementation gets fresh logits that another operation made, hence may overwrite them. With
`linear_token_log_probs` each one leaves the weight's gradient in a float32 main_grad, as training does; one that has it
in the weight's own .grad adds it as megatron-core's DistributedDataParallel would.

Shape letters: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gspo_moe.kernels import kernels, linear_token_log_probs, token_log_probs
from gspo_moe.kernels.linear import MAPPED
from gspo_moe.kernels.products import ROWS

Function = Callable[..., torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward_backward")


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


class Produced(torch.autograd.Function):
    """Logits in given memory, as an operation's output: neither a leaf nor a view of one."""

    @staticmethod
    def forward(ctx: Any, handle: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.new_empty(0).set_(buffer)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:
        return None, None


class TokenCase:
    """One call on fresh logits [T, V]."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pristine = torch.randn(options.tokens, options.vocab, generator=generator).mul_(4).to(dtype)
        self.buffer = torch.empty_like(self.pristine)
        self.targets = torch.randint(options.vocab, (options.tokens,), generator=generator)
        self.handle = torch.zeros((), requires_grad=True)

    def prepare(self) -> None:
        self.buffer.copy_(self.pristine)

    def run(self, function: Function, backward: bool) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            found = function(Produced.apply(self.handle, self.buffer), self.targets)
            if backward:
                found.float().sum().backward()
        return found.detach()


class LinearCase:
    """One call on hidden states [T, H] and an output weight [V, H] whose gradient ends in main_grad."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (options.tokens, options.hidden)
        self.hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(options.vocab, options.hidden, generator=generator) * (4 / options.hidden**0.5)
        self.weight = weight.to(dtype).requires_grad_()
        self.weight.main_grad = torch.zeros(self.weight.shape)  # type: ignore[attr-defined]
        self.targets = torch.randint(options.vocab, (options.tokens,), generator=generator)

    def prepare(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def run(self, function: Function, backward: bool) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            found = function(self.hidden, self.weight, self.targets)
            if backward:
                found.float().sum().backward()
                if self.weight.grad is not None:
                    self.weight.main_grad.add_(self.weight.grad)  # type: ignore[attr-defined]
        return found.detach()


def resident(field: str) -> int:
    """VmRSS or, since the last reset, VmHWM, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak resident memory during the call beyond that before it."""
    ctypes.CDLL(None).malloc_trim(0)  # or the call would find memory that the one before had freed
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 0)


def check_agreement(case: Any, functions: dict[str, Function]) -> None:
    """All implementations find the same, as far as a 16-bit result can tell."""
    for function in functions.values():
        case.prepare()
        mine = case.run(functions["gspo_moe"], False)
        case.prepare()
        torch.testing.assert_close(case.run(function, False).float(), mine, atol=0.2, rtol=0.02)


def measure(op: str, case: Any, functions: dict[str, Function], repeats: int) -> list[dict[str, Any]]:
    rows = []
    check_agreement(case, functions)
    for name in PASSES:
        backward = name == "forward_backward"
        memory: dict[str, int] = {}
        for implementation, function in functions.items():
            for _ in range(2):  # the first one's memory is also the compiler's and the libraries' own
                case.prepare()
                memory[implementation] = extra_bytes(partial(case.run, function, backward))
        times: dict[str, list[tuple[float, float]]] = {implementation: [] for implementation in functions}
        for _ in range(repeats):
            for implementation, function in functions.items():
                case.prepare()
                start, cpu_start = time.perf_counter(), time.process_time()
                case.run(function, backward)
                times[implementation].append((time.perf_counter() - start, time.process_time() - cpu_start))
        for implementation in functions:
            seconds, cpu_seconds = (statistics.median(column) for column in zip(*times[implementation], strict=True))
            rows.append({"op": op, "pass": name, "implementation": implementation, "seconds": seconds})
            rows[-1] |= {"cpu_seconds": cpu_seconds, "extra_bytes": memory[implementation]}
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=2048, help="of linear_token_log_probs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ops", nargs="+", default=["token_log_probs", "linear_token_log_probs"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--implementations", nargs="+", help="beside gspo_moe; default all")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a minute")
    parser.add_argument(
        "--memory-budget-mib",
        type=int,
        help="of linear_token_log_probs; default so that the peak is an eighth of eager's",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def memory_budget(options: argparse.Namespace, itemsize: int) -> int:
    """Bytes for linear_token_log_probs: as asked, or so that its peak with backward is an eighth of eager's.

    Eager has three times the logits (log-probs, their gradient, the logits'), four times in 16 bits, then the logits'
    gradient and the weight's. Beside the budget there is the gradient of hidden, in float32 and in 16 bits; in float32
    also rows of a product to add to it; and what glibc's heap keeps of smaller blocks.
    """
    if options.memory_budget_mib is not None:
        return int(options.memory_budget_mib * 2**20)
    logits, weight = (options.vocab * rows * itemsize for rows in (options.tokens, options.hidden))
    narrow = itemsize == 2
    eager = max((4 if narrow else 3) * logits, logits + weight)
    beside = options.hidden * (options.tokens * 6 if narrow else (options.tokens + ROWS) * 4)
    return int(eager / 8.1) - beside - MAPPED // 2


def join_group() -> None:
    """A tensor-parallel group of one, which megatron-core's cross entropy asks for."""
    from gspo_moe.config.layout import Layout
    from gspo_moe.parallel.groups import initialize

    initialize(Layout(1, 1, 1, 1, None, 1, 1, 1, False), seed=1)


def main() -> None:
    options = parse_arguments()
    join_group()
    torch.set_num_threads(options.threads)

    def ours_linear(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        budget = memory_budget(options, weight_VH.element_size())
        found = linear_token_log_probs(hidden_TH, weight_VH, targets_T, memory_budget=budget, into_main_grad=True)
        return found.log_probs

    token = TOKEN | ({} if options.no_compile else {f"compile_{k}": torch.compile(f) for k, f in PLAIN.items()})
    linear: dict[str, Function] = {"gspo_moe": ours_linear, "eager": eager_linear, "eager_fp32": eager_linear_fp32}
    if importlib.util.find_spec("liger_kernel") is not None:
        linear["liger_chunked"] = liger_chunked
    suites: dict[str, tuple[Any, dict[str, Function]]] = {
        "token_log_probs": (TokenCase, token),
        "linear_token_log_probs": (LinearCase, linear),
    }
    unknown = set(options.implementations or ()) - {name for op in options.ops for name in suites[op][1]}
    if unknown:
        raise SystemExit(f"--implementations: no {', '.join(sorted(unknown))} here; liger_chunked needs liger-kernel")
    print(
        f"kernels: {kernels().cpu or kernels().missing}; [{options.tokens}, {options.vocab}], {options.threads} threads"
    )
    rows: list[dict[str, Any]] = []
    for op in options.ops:
        case_type, functions = suites[op]
        for dtype in options.dtypes:
            case = case_type(options, DTYPES[dtype])
            chosen = {k: f for k, f in functions.items() if dtype != "float32" or not k.endswith("_fp32")}
            if options.implementations:
                chosen = {k: f for k, f in chosen.items() if k in ("gspo_moe", *options.implementations)}
            found = [{**row, "dtype": dtype} for row in measure(op, case, chosen, options.repeats)]
            del case
            rows += found
            for name in PASSES:
                mine = {row["implementation"]: row for row in found if row["pass"] == name}
                base = mine["gspo_moe"]
                for implementation, row in mine.items():
                    print(
                        f"{op:<22} {dtype:<9} {name:<17} {implementation:<28} {row['seconds']:9.4f} s "
                        f"{row['seconds'] / base['seconds']:6.2f}x  {row['cpu_seconds']:9.4f} CPU s "
                        f"{row['cpu_seconds'] / base['cpu_seconds']:6.2f}x  {row['extra_bytes'] / 2**20:9.1f} MiB",
                        flush=True,
                    )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
