"""`gspo-moe parity`: one checkpoint scored in many layouts and precisions, each against the first.

Every case is a `gspo-moe score` of its own, in as many processes as its layout has; nothing here loads the model.
Shape letters: T scored tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gspo_moe.config.layout import check_layout
from gspo_moe.config.loading import load_config
from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import own_tokenizer
from gspo_moe.errors import ConfigError, ParityError
from gspo_moe.platform import choose_backends, megatron_version
from gspo_moe.routing.volatility import volatility

SIZES = ("tensor", "pipeline", "expert", "context", "expert_tensor")
SEQUENCES, LENGTH = 8, 48  # of random tokens where no text is given


@dataclass(frozen=True)
class Case:
    """processes: of the layout `parallel`. dtype, backend: the config's keys of `model`."""

    processes: int
    parallel: dict[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    backend: str = "auto"

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.parallel.items()) or "plain"
        return f"{self.processes}: {sizes} {self.dtype}{'' if self.backend == 'auto' else f' {self.backend}'}"

    @property
    def overrides(self) -> list[str]:
        sizes = [f"parallel.{name}={size}" for name, size in self.parallel.items()]
        return [*sizes, f"model.dtype={self.dtype}", f"model.backend={self.backend}"]

    def rounded(self, first: Case) -> bool:
        """Whether the two differ by bf16's rounding, in one of them or, in another order of sums, in both."""
        return "bf16" in (self.dtype, first.dtype)


@dataclass(frozen=True)
class Tolerances:
    """What a case may differ from the first by. log_prob: nats, largest. slots: share of expert slots. k3: mean.

    rounded_slots, rounded_k3: where either is in bf16; their log-probs are judged by k3 alone.
    """

    log_prob: float = 1e-4
    slots: float = 1e-3
    k3: float = 1e-6
    rounded_slots: float = 0.1
    rounded_k3: float = 1e-2


@dataclass(frozen=True)
class Difference:
    """A case against the first: k3 is the mean of exp(d) - 1 - d over tokens, d the log-prob's change (nats)."""

    log_prob_max: float
    log_prob_mean: float
    k3: float
    slot_change: float
    any_layer_flip: float

    def within(self, tolerances: Tolerances, *, rounded: bool) -> bool:
        if rounded:
            return self.k3 <= tolerances.rounded_k3 and self.slot_change <= tolerances.rounded_slots
        exact = self.log_prob_max <= tolerances.log_prob and self.k3 <= tolerances.k3
        return exact and self.slot_change <= tolerances.slots


def cases(most: int, dtypes: Sequence[str], backends: Sequence[str]) -> list[Case]:
    """The sweep for up to `most` processes, the plain layout first: each size alone, pairs, precisions, backends."""
    powers = [2**power for power in range(1, most.bit_length()) if 2**power <= most]
    found = [Case(1)]
    found += [Case(size, {name: size}) for size in powers for name in SIZES[:4]]
    pairs = [{"tensor": 2, "expert": 2, "expert_tensor": 1}]
    pairs += [{"tensor": 2, "pipeline": 2}, {"pipeline": 2, "expert": 2}, {"tensor": 2, "context": 2}]
    found += [Case(2 if "expert_tensor" in pair else 4, pair) for pair in pairs]
    found = [one for one in found if one.processes <= most]
    return [Case(one.processes, one.parallel, d, b) for d in dtypes for b in backends for one in found]


def parse_layout(text: str, dtypes: Sequence[str], backends: Sequence[str]) -> list[Case]:
    """The cases of `tensor=2 expert=4`, in as few processes as it needs. Raises ConfigError for what is no layout."""
    sizes: dict[str, int] = {}
    for part in text.split():
        name, _, size = part.partition("=")
        if name not in SIZES or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--layout {text!r}: {part} is none of {', '.join(f'{one}=N' for one in SIZES)}")
        sizes[name] = int(size)
    dense = sizes.get("tensor", 1) * sizes.get("context", 1)
    experts = sizes.get("expert", 1) * sizes.get("expert_tensor", sizes.get("tensor", 1))
    processes = math.lcm(dense, experts) * sizes.get("pipeline", 1)
    return [Case(processes, sizes, d, b) for d in dtypes for b in backends]


def parity(
    model: Path, data: Path | None, sweep: Sequence[Case], most: int, tolerances: Tolerances
) -> Iterator[tuple[Case, Difference | None, str]]:
    """Each case as it is done: its difference from the first, None without one, and `within`, `OFF` or why none.

    most: processes that this machine has. Raises ConfigError where the first case is left out or nothing is compared,
    ParityError at the end where one differs by more than `tolerances` allow, or failed.
    """
    off: list[str] = []
    compared = 0
    with tempfile.TemporaryDirectory() as folder:
        text = data or _random_text(_config(model, sweep[0]), Path(folder) / "text.jsonl")
        first: list[dict[str, Any]] | None = None
        for number, case in enumerate(sweep):
            reason = _misfit(model, case, most)
            if reason is not None:
                if first is None:
                    raise ConfigError(f"the first case, {case}, cannot run, so nothing can be compared: {reason}")
                yield case, None, f"left out: {reason}"
                continue
            records = _run(model, text, case, Path(folder) / f"{number}.jsonl")
            if isinstance(records, str):
                if first is None:
                    raise ParityError(f"the first case, {case}, failed, so nothing can be compared: {records}")
                yield case, None, f"failed: {records}"
                off.append(str(case))
                continue
            first = records if first is None else first
            compared += 1
            found = difference(first, records)
            good = found.within(tolerances, rounded=case.rounded(sweep[0]))
            off += [] if good else [str(case)]
            yield case, found, "within" if good else "OFF"
    if off:
        raise ParityError(f"{len(off)} of {len(sweep)} cases failed or differ by more than allowed: {'; '.join(off)}")
    if compared == 1 < len(sweep):
        raise ConfigError("every case but the first was left out, so nothing was compared; give --processes, --layout")


def difference(first: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Difference:
    """Of two files of `gspo-moe score --routes` for the same lines."""
    old_T, new_T = (torch.tensor([x for record in one for x in record["log_probs"]]).double() for one in (first, other))
    old_TLK, new_TLK = (torch.tensor([x for record in one for x in record["routes"]]) for one in (first, other))
    change_T = new_T - old_T
    moved = volatility(old_TLK, new_TLK)
    slot_change, any_flip = moved["slot_change"], moved["any_layer_flip"]
    assert isinstance(slot_change, float)
    assert isinstance(any_flip, float)
    size_T = change_T.abs()
    k3 = (change_T.expm1() - change_T).mean().item()
    return Difference(size_T.max().item(), size_T.mean().item(), k3, slot_change, any_flip)


def _config(model: Path, case: Case) -> Config:
    return load_config(None, ["model.preset=null", f"model.hf={model}", *case.overrides])


def _misfit(model: Path, case: Case, most: int) -> str | None:
    """Why a case cannot run on this machine, in one line; None where it can."""
    if case.processes > most:
        return f"needs {case.processes} processes, of {most}"
    try:
        config = _config(model, case)
        check_layout(config, config.model.architecture(), case.processes, megatron_version())
        choose_backends(dict(config.model.backend), config.model.dtype)
    except ConfigError as error:
        return str(error).splitlines()[0]
    return None


def _random_text(config: Config, file: Path) -> Path:
    """A file of random tokens, the same ones every time."""
    architecture = config.model.architecture()
    tokenizer = own_tokenizer(config.tokenizer, config.model.folder)
    vocabulary = architecture.vocab_size if tokenizer is None else tokenizer.vocab_size
    draw = random.Random(1)
    length = min(LENGTH, architecture.max_positions)
    lines = [{"token_ids": [draw.randrange(vocabulary) for _ in range(length - number)]} for number in range(SEQUENCES)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _run(model: Path, data: Path, case: Case, output: Path) -> list[dict[str, Any]] | str:
    """What `gspo-moe score` wrote, or the last line of its complaint."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}", "-m"]
    command = [sys.executable, "-m", *(launcher if case.processes > 1 else []), "gspo_moe", "score"]
    command += ["--model", str(model), "--data", str(data), "--output", str(output), "--routes", *case.overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("gspo-moe: ")] or done.stderr.splitlines()
        return said[-1] if said else f"exit code {done.returncode}"
    with output.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]
