"""What the start of a run must not import: seconds, for names that it does not use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HEAVY = {
    "megatron.core.distributed.fsdp.src",
    "networkx",
    "setuptools",
    "sympy",
    "torch._dynamo.config",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.cpp_extension",
    "transformers",
}
PROGRAM = """
import json, sys
if __name__ == "__main__":
    from gspo_moe.cli import main
    code = main(sys.argv[1:])
    print(json.dumps([code, sorted(sys.modules)]))
"""
SMALL = ("model.preset=tiny", "evaluation.prompts=0", "checkpoint.keep=0", "checkpoint.export_hf=false")
STEP = ("schedule.steps=1", "logging.progress=false", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2")


def modules_after(program: str, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    code, names = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core's imports are its own on a GPU")
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_run_without_checkpoints(stage: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"{{stage: {stage}, task: {{name: sort_letters}}, logging: {{run_dir: {tmp_path / 'run'}}}}}")
    assert not modules_after(PROGRAM, "train", str(config), *SMALL, *STEP) & HEAVY


def test_reward_workers_do_without_torch() -> None:
    worker = "import json, sys, gspo_moe.tasks.pool; print(json.dumps([0, sorted(sys.modules)]))"
    assert not modules_after(worker) & {"torch", "megatron", "numpy", "rich"}


def test_the_command_itself_does_without_torch() -> None:
    command = "import json, sys, gspo_moe.cli; print(json.dumps([0, sorted(sys.modules)]))"
    assert not modules_after(command) & {"torch", "megatron", "numpy", "pydantic", "rich", "yaml"}
