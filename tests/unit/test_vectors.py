"""The golden vectors and the script beside them belong together: its formulas give the stored results."""

import json
import runpy
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "vectors"
GENERATE = runpy.run_path(str(FOLDER / "generate.py"))


def test_policy_losses() -> None:
    for case in json.loads((FOLDER / "policy_loss.json").read_text()):
        names = ("log_probs", "old_log_probs", "advantages", "cu_seqlens", "response_mask")
        arrays = [np.array(case[name]) for name in names]
        results = GENERATE["policy_loss"](case["algorithm"], *arrays, case["clip_low"], case["clip_high"])
        stored = ("loss", "grad_log_probs", "clip_fraction_sequence", "clip_fraction_token")
        for name, result in zip(stored, results, strict=True):
            np.testing.assert_allclose(result, case[name], rtol=0, atol=1e-12)


def test_advantages() -> None:
    for case in json.loads((FOLDER / "advantages.json").read_text()):
        result = GENERATE["group_advantages"](np.array(case["rewards"]), case["group_size"])
        np.testing.assert_allclose(result, case["advantages"], rtol=0, atol=1e-12)


def test_routing() -> None:
    for case in json.loads((FOLDER / "routing.json").read_text()):
        for name, result in GENERATE["volatility"](np.array(case["old"]), np.array(case["new"])).items():
            np.testing.assert_allclose(result, case[name], rtol=0, atol=1e-12)
