"""torch._dynamo before and after something of it is needed, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is put in place of it")
ROOT = Path(__file__).parents[3]
# A step of AdamW, by hand: p - lr * (wd * p + sign(gradient)) at the first step, where m / sqrt(v) is the sign.
STEP = """
import sys
from gspo_moe.platform import prepare_megatron
prepare_megatron()
import torch
parameter = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
optimizer = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.1, eps=0)
def step():
    optimizer.zero_grad()
    (parameter * torch.tensor([3.0, -4.0])).sum().backward()
    optimizer.step()
step()
torch.testing.assert_close(parameter.data, torch.tensor([2.0 - 0.1 - 0.5, -1.0 + 0.05 + 0.5]))
assert "torch._dynamo.config" not in sys.modules
kept_off = torch.compiler.disable(lambda x: x + 1)
assert kept_off(1) == 2
assert "torch._dynamo.config" not in sys.modules
"""
AFTER = """
assert torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)(torch.tensor(2.0)) == 4
assert "torch._dynamo.config" in sys.modules
assert kept_off(1) == 2
try:
    torch.compile(lambda x: kept_off(x), backend="eager", fullgraph=True)(torch.tensor(2.0))
except torch._dynamo.exc.Unsupported:
    pass
else:
    raise AssertionError("was traced, though it was to be kept off")
step()
"""
BELOW = """
import torch._dynamo.utils
assert type(torch._dynamo).__name__ == "module"
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
"""
AGAIN = """
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.distributed.destroy_process_group()
import torch._inductor
step()
"""


@pytest.mark.parametrize("then", [AFTER, BELOW, AGAIN], ids=["compile", "module below", "process group"])
def test_an_optimizer_needs_nothing_of_it_and_whatever_does_gets_all(then: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP + then], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
