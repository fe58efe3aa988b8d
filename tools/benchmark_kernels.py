"""Times the log-prob kernels against what others do: medians of interleaved runs, and peak extra memory.

    python tools/benchmark_kernels.py --tokens 2048 --vocab 151936 --threads 2 --json kernels.json
    python tools/benchmark_kernels.py --device cuda --tokens 8192 --dtypes bfloat16 --repeats 20

Rows: op, dtype, pass (forward, or forward_backward), implementation, seconds and cpu_seconds (medians; the second is of
all threads), extra_bytes (peak resident memory beyond inputs and main_grad). On a machine that others use, seconds
measure them too; CPU seconds do not under OMP_WAIT_POLICY=passive, without which threads spin while they wait.

On a GPU seconds are the device's, between events, with the host far enough ahead not to count; extra_bytes are of
allocated memory; `backward` is a pass of its own; a row of op `copy` has the bandwidth of a copy of 2 GiB; and
token_log_probs has gbytes_per_second, the fewest bytes of logits that the pass must move over its seconds (once read
forward, once read and once written backward), with copy_share, what that is of the copy's.

Every implementation gets fresh logits that another operation made, hence may overwrite them. With
`linear_token_log_probs` each one leaves the weight's gradient in a float32 main_grad, as training does; one that has it
in the weight's own .grad adds it as megatron-core's DistributedDataParallel would.

Shape letters: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.kernels import kernels, linear_token_log_probs
from gspo_moe.kernels.blocks import MAPPED
from gspo_moe.kernels.products import ROWS
from gspo_moe.parallel.groups import initialize, shut_down
from tools.kernel_implementations import linear_implementations, token_implementations
from tools.kernel_timing import Function, Trial, copy_row, extra_bytes, run, time_on_cpu, time_on_gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS_MOVED = {"forward": 1, "backward": 2, "forward_backward": 3}


class Produced(torch.autograd.Function):
    """Logits in given memory, as an operation's output: neither a leaf nor a view of one."""

    @staticmethod
    def forward(ctx: Any, handle: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.new_empty(0).set_(buffer)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:
        return None, None


class TokenCase:
    """One call on fresh logits [T, V]."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(min(options.tokens, 2048), options.vocab, generator=generator).mul_(4).to(dtype)
        repeats = -(-options.tokens // len(rows))
        self.pristine = rows.to(options.device).repeat(repeats, 1)[: options.tokens]
        self.buffer = torch.empty_like(self.pristine)
        self.targets = torch.randint(options.vocab, (options.tokens,), generator=generator).to(options.device)
        self.handle = torch.zeros((), requires_grad=True, device=options.device)

    def prepare(self) -> None:
        self.buffer.copy_(self.pristine)

    def forward(self, function: Function) -> torch.Tensor:
        return function(Produced.apply(self.handle, self.buffer), self.targets)

    def backward(self, found: torch.Tensor) -> None:
        found.float().sum().backward()


class LinearCase:
    """One call on hidden states [T, H] and an output weight [V, H] whose gradient ends in main_grad."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        generator, device = torch.Generator().manual_seed(0), options.device
        shape = (options.tokens, options.hidden)
        self.hidden = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(options.vocab, options.hidden, generator=generator) * (4 / options.hidden**0.5)
        self.weight = weight.to(device, dtype).requires_grad_()
        self.weight.main_grad = torch.zeros(self.weight.shape, device=device)
        self.targets = torch.randint(options.vocab, (options.tokens,), generator=generator).to(device)

    def prepare(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def forward(self, function: Function) -> torch.Tensor:
        return function(self.hidden, self.weight, self.targets)

    def backward(self, found: torch.Tensor) -> None:
        found.float().sum().backward()
        if self.weight.grad is not None:
            self.weight.main_grad.add_(self.weight.grad)


def check_agreement(case: Any, trial: Trial) -> None:
    """All implementations find the same, as far as a 16-bit result can tell."""

    def compare(name: str, function: Function) -> None:
        case.prepare()
        mine = run(case, trial.able["gspo_moe"], False)
        case.prepare()
        torch.testing.assert_close(run(case, function, False).float(), mine, atol=0.2, rtol=0.02)

    trial.each(compare)


def measure(op: str, case: Any, functions: dict[str, Function], repeats: int) -> list[dict[str, Any]]:
    on_gpu = case.targets.is_cuda
    time_it = time_on_gpu if on_gpu else time_on_cpu
    trial = Trial(op, functions)
    check_agreement(case, trial)
    rows: list[dict[str, Any]] = []
    for backward in (False, True):
        memory: dict[str, int] = {}
        times: dict[tuple[str, str], list[tuple[float, float]]] = {}

        def weigh(name: str, function: Function) -> None:
            for _ in range(2):  # the first one's memory is also the compiler's and the libraries' own
                case.prepare()
                memory[name] = extra_bytes(partial(run, case, function, backward), on_gpu)  # noqa: B023

        def time_once(name: str, function: Function) -> None:
            case.prepare()
            for pass_name, pair in time_it(case, function, backward).items():  # noqa: B023
                times.setdefault((pass_name, name), []).append(pair)  # noqa: B023

        trial.each(weigh)
        for _ in range(repeats):
            trial.each(time_once)
        for (name, implementation), pairs in times.items():
            seconds, cpu_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows.append({"op": op, "pass": name, "implementation": implementation, "seconds": seconds})
            rows[-1] |= {"cpu_seconds": cpu_seconds, "extra_bytes": memory[implementation]}
            if on_gpu and isinstance(case, TokenCase):
                rows[-1]["gbytes_per_second"] = case.buffer.nbytes * LOGITS_MOVED[name] / seconds / 1e9
    return rows + trial.errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=2048, help="of linear_token_log_probs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ops", nargs="+", default=["token_log_probs", "linear_token_log_probs"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--implementations", nargs="+", help="beside gspo_moe; default all")
    parser.add_argument("--without", nargs="+", default=[], help="implementations to leave out")
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

    Eager has three times the logits (log-probs, their gradient, the logits'), on the CPU four times in 16 bits, then
    the logits' gradient and the weight's. Beside the budget there is the gradient of hidden, in float32 and in 16 bits;
    in float32 also rows of a product to add to it; and what glibc's heap keeps of smaller blocks.
    """
    if options.memory_budget_mib is not None:
        return int(options.memory_budget_mib * 2**20)
    logits, weight = (options.vocab * rows * itemsize for rows in (options.tokens, options.hidden))
    narrow = itemsize == 2
    eager = max((4 if narrow and options.device == "cpu" else 3) * logits, logits + weight)
    beside = options.hidden * (options.tokens * 6 if narrow else (options.tokens + ROWS) * 4)
    return int(eager / 8.1) - beside - MAPPED // 2


def join_group() -> None:
    """A tensor-parallel group of one, which megatron-core's cross entropy asks for."""
    from gspo_moe.config.layout import Layout

    initialize(Layout(1, 1, 1, 1, None, 1, 1, 1, False), seed=1)


def main() -> None:
    options = parse_arguments()
    join_group()
    torch.set_num_threads(options.threads)

    def ours_linear(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        budget = memory_budget(options, weight_VH.element_size())
        found = linear_token_log_probs(hidden_TH, weight_VH, targets_T, memory_budget=budget, into_main_grad=True)
        return found.log_probs

    on_gpu = options.device == "cuda"
    suites: dict[str, tuple[Any, dict[str, Function]]] = {
        "token_log_probs": (TokenCase, token_implementations(on_gpu, not options.no_compile)),
        "linear_token_log_probs": (LinearCase, linear_implementations(ours_linear)),
    }
    unknown = {*(options.implementations or ()), *options.without} - {
        name for op in options.ops for name in suites[op][1]
    }
    if unknown:
        raise SystemExit(
            f"--implementations, --without: no {', '.join(sorted(unknown))} here; liger_* need liger-kernel"
        )
    place = torch.cuda.get_device_name() if on_gpu else f"{options.threads} threads"
    print(f"kernels: {' - '.join(filter(None, kernels().summary))}; [{options.tokens}, {options.vocab}], {place}")
    rows: list[dict[str, Any]] = [copy_row()] if on_gpu else []
    for op in options.ops:
        case_type, functions = suites[op]
        for dtype in options.dtypes:
            case = case_type(options, DTYPES[dtype])
            chosen = {k: f for k, f in functions.items() if dtype != "float32" or not k.endswith("_fp32")}
            chosen = {k: f for k, f in chosen.items() if k not in options.without}
            if options.implementations:
                chosen = {k: f for k, f in chosen.items() if k in ("gspo_moe", *options.implementations)}
            found = [{**row, "dtype": dtype} for row in measure(op, case, chosen, options.repeats)]
            del case
            for row in found:
                if "gbytes_per_second" in row:
                    row["copy_share"] = row["gbytes_per_second"] / rows[0]["gbytes_per_second"]
            rows += found
            show(found)
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    shut_down()


def show(found: list[dict[str, Any]]) -> None:
    base = {row["pass"]: row for row in found if row["implementation"] == "gspo_moe"}
    for row in found:
        if "error" in row:
            print(f"{row['op']:<22} {row['dtype']:<9} {row['implementation']} failed: {row['error']}", flush=True)
            continue
        mine = base[row["pass"]]
        rate = f"  {row['gbytes_per_second']:7.0f} GB/s {row['copy_share']:7.1%}" if "copy_share" in row else ""
        print(
            f"{row['op']:<22} {row['dtype']:<9} {row['pass']:<17} {row['implementation']:<28} "
            f"{row['seconds']:9.4f} s {row['seconds'] / mine['seconds']:6.2f}x  {row['cpu_seconds']:9.4f} CPU s "
            f"{row['cpu_seconds'] / max(mine['cpu_seconds'], 1e-9):6.2f}x  {row['extra_bytes'] / 2**20:9.1f} MiB{rate}",
            flush=True,
        )


if __name__ == "__main__":
    main()
