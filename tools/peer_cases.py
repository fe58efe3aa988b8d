"""The races of `benchmark_peers.py`: sizes, the weights that both sides read, and how each side is started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gspo_moe.config import Config, load_config
from gspo_moe.config.loading import as_override
from tools.sides import Side, python_script, torchrun_script

PEERS = Path(__file__).with_name("peers.yaml")
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """overrides: of tools/peers.yaml. memory_target: peak of ours over TRL's, at most."""

    overrides: tuple[str, ...]
    memory_target: float | None


CASES = {
    "m": Case((), 0.5),
    "vocabulary": Case(("model.overrides.vocab_size=151936", "rollout.max_response_tokens=64"), 0.4),
    "long": Case(("rollout.max_response_tokens=512",), None),
}


def write_weights(case: Case, folder: Path) -> tuple[str, ...]:
    """Writes random weights as an HF folder; the overrides of tools/peers.yaml with which both sides train them."""
    import torch
    from safetensors.torch import save_file

    from gspo_moe.model.hf import write_config
    from gspo_moe.model.weights import SINGLE_FILE, RandomSource

    config = load_config(PEERS, case.overrides)
    architecture = config.model.architecture()
    source = RandomSource(architecture, config.seed)
    folder.mkdir(parents=True)
    save_file({name: source.get(name).cpu() for name in source.shapes()}, folder / SINGLE_FILE, {"format": "pt"})
    write_config(folder, architecture, torch.float32)
    model = as_override("model", {"hf": str(folder), "dtype": config.model.dtype})
    kept = [override for override in case.overrides if not override.startswith("model.")]
    return (model, "tokenizer.kind=sentencepiece", *kept)


@dataclass(frozen=True)
class Race:
    """How long each side is measured, and TRL's Python. ours: overrides of the side in several processes."""

    trl_python: str
    processes: int
    warmup: int
    steps: int
    ours: tuple[str, ...] = ()
    micro_batch: int | None = None


def sides(race: Race, overrides: Sequence[str]) -> list[Side]:
    """One thread each, then all `processes` cores; ours and theirs by turns."""
    config = [str(PEERS), *overrides, "--synthetic", str(PROMPT_TOKENS)]
    counts = ["--warmup", str(race.warmup), "--steps", str(race.steps)]
    theirs = [*config, *([] if race.micro_batch is None else ["--micro-batch", str(race.micro_batch)])]
    many, python = race.processes, race.trl_python
    return [
        python_script("ours_1", sys.executable, [*config, *counts], 1, "benchmark_throughput.py"),
        python_script("trl_1", python, [*theirs, *counts], 1, "benchmark_trl.py"),
        python_script("transformers_1", python, theirs, 1, "benchmark_transformers.py"),
        torchrun_script(
            f"ours_{many}", sys.executable, [*config, *race.ours, *counts], many, "benchmark_throughput.py"
        ),
        python_script(f"trl_{many}", python, [*theirs, *counts], many, "benchmark_trl.py"),
        python_script(f"transformers_{many}", python, theirs, many, "benchmark_transformers.py"),
    ]


def sizes(case: Case) -> dict[str, object]:
    """What a case's figures depend on, for the file of results."""
    config: Config = load_config(PEERS, case.overrides)
    return {
        "model": config.model.architecture().model_dump(mode="json"),
        "dtype": config.model.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "answers": config.rollout.prompts_per_step * config.rollout.samples_per_prompt,
        "answer_tokens": config.rollout.max_response_tokens,
        "micro_batch_tokens": config.schedule.micro_batch_tokens,
    }
