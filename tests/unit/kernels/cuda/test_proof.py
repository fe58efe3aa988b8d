"""The stages of `bash tools/check_kernels.sh`: what can be known of the CUDA kernels without a GPU."""

import random

import pytest

from tests.unit.kernels.cuda.proof import STAGES, Proof, missing_tools


@pytest.fixture(scope="module")
def proof() -> Proof:
    if missing := missing_tools():
        pytest.skip(f"needs {', '.join(missing)}")
    return Proof(seed=random.randrange(10**6))


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage: str, proof: Proof) -> None:
    print(f"random cases: --seed {proof.seed}")
    assert STAGES[stage](proof)
