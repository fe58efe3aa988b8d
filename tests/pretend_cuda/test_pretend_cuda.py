"""Unpatched megatron-core on a pretended GPU: nothing mixes devices, the numbers are the recorded ones, waits are few.

bounds.json holds how often each function may make the host wait for the device, in sixteen token steps of a batch and
in one mini-batch's training step, both of two layers, and how many operations those token steps may launch. Where a
wait was removed or is wanted, `python -m tests.pretend_cuda.run --write` measures it anew.
"""

import json

import pytest
import torch

from gspo_moe.platform import megatron_version
from tests.pretend_cuda.run import BOUNDS, measure

WHY_NOT = (
    "needs a CUDA build of torch"
    if torch.version.cuda is None
    else "this machine has a GPU, on which tests/gpu runs"
    if torch.cuda.is_available()
    else f"needs megatron-core 0.19, and {megatron_version()} is installed"
    if not megatron_version().startswith("0.19.")
    else ""
)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
LIMITS: dict[str, dict[str, int]] = json.loads(BOUNDS.read_text())


@pytest.mark.parametrize("scenario", ["golden_fp32", "golden_bf16", "empty_pack", "rl_step"])
def test_tensors_stay_on_their_device_and_give_the_recorded_numbers(scenario: str) -> None:
    assert measure(scenario), "the tensors were on the device, so something was read from there"


@pytest.mark.parametrize("scenario", LIMITS)
def test_no_function_waits_for_the_device_more_often_than_it_may(scenario: str) -> None:
    found, limits = measure(scenario), LIMITS[scenario]
    over = {name: f"{count}, may {limits.get(name, 0)}" for name, count in found.items() if count > limits.get(name, 0)}
    if over:
        lines = {line: n for line, n in measure(scenario, "--lines").items() if _function(line) in over}
        pytest.fail(f"waits beyond bounds.json: {json.dumps(over, indent=2)}\ncaused by {json.dumps(lines, indent=2)}")


def _function(line: str) -> str:
    """`kind file:function` of `kind file:number:function < ...`."""
    place, _, function = line.split(" < ")[0].rpartition(":")
    return f"{place.rpartition(':')[0]}:{function}"
