"""The Transformer Engine backend on a stand-in for it (tests/stand_in)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_backend_passes_its_checks_on_the_stand_in() -> None:
    # A process of its own: megatron-core looks for Transformer Engine when it is imported.
    path = os.pathsep.join([str(ROOT / "tests/stand_in"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/unit/model/te_checks.py"]
    checks = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert checks.returncode == 0, checks.stdout
