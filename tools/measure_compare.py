"""`gspo-moe compare` of two random Qwen3 MoE checkpoints under a limit of memory well below their size.

    python tools/measure_compare.py FOLDER [--layers 24] [--limit 3] [--rows 4] [--tokens 64]

FOLDER, which is made with 0.26 GB a layer and checkpoint where it is absent, may be deleted afterwards. The limit, in
GB, is one of the process's address space, mapped files too, by which the command finds that a model does not fit.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

HIDDEN, EXPERTS, INTERMEDIATE, VOCABULARY = 1024, 64, 640, 32_000
NOISE = 1e-3  # that the second checkpoint has on the first one's weights, of standard deviation 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory and time of a comparison that streams.")
    parser.add_argument("folder", type=Path)
    for name, value in (("layers", 24), ("limit", 3), ("rows", 4), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    models = [options.folder / name for name in ("a", "b")]
    data = options.folder / "data.jsonl"
    if not options.folder.exists():
        make(models, options.layers)
    generator = random.Random(1)
    texts = [[generator.randrange(VOCABULARY) for _ in range(options.tokens)] for _ in range(options.rows)]
    data.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in texts))
    size = sum(file.stat().st_size for file in models[0].glob("*.safetensors")) / 1e9
    began = time.perf_counter()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (options.limit * 10**9,) * 2)
    command = [sys.executable, "-m", "gspo_moe", "compare", *map(str, models), "--data", str(data)]
    code = subprocess.run(command, preexec_fn=limit).returncode
    used, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    print(f"{size:.2f} GB of weights each, {options.limit} GB of address space: exit code {code}, ", end="")
    print(f"peak {used.ru_maxrss * 1024 / 1e9:.2f} GB resident, ", end="")
    print(f"{used.ru_utime + used.ru_stime:.0f} s of CPU, {seconds:.0f} s in all")
    return code


def make(folders: list[Path], layers: int) -> None:
    """Checkpoints as published, a file of each four layers, with no more of them in memory."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        tie_word_embeddings=False, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Qwen3MoeForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        number = int(name.split(".")[2]) // 4 if ".layers." in name else "ends"
        parts.setdefault(f"model-{number}.safetensors", {}).update(published(name, shape))
    for folder in folders:
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        file_of = {name: file for file, names in parts.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    for file, names in parts.items():
        tensors = {name: drawn(shape, 0.02, generator) for name, shape in names.items()}
        for folder in folders:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            for tensor in tensors.values():
                tensor += drawn(tensor.shape, NOISE, generator)


def published(name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """A tensor of transformers 5's by its names in checkpoints, where experts stand one by one."""
    if ".experts." not in name:
        return {name: shape}
    layer, part = name.split(".experts.")
    rows = shape[1] // 2 if part == "gate_up_proj" else shape[1]
    matrices = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    return {
        f"{layer}.experts.{expert}.{matrix}.weight": torch.Size((rows, shape[2]))
        for expert in range(shape[0])
        for matrix in matrices
    }


def drawn(shape: torch.Size, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Norms are drawn too, around 1."""
    drawn = torch.empty(shape, dtype=torch.bfloat16).normal_(std=deviation, generator=generator)
    return drawn + (len(shape) == 1 and deviation > NOISE)


if __name__ == "__main__":
    sys.exit(main())
