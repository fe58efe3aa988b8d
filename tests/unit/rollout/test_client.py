"""What a client of any engine needs: it loads without megatron-core, whose place is the embedded engine."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe import rollout
from gspo_moe.errors import ConfigError
from gspo_moe.rollout.engine import make_stop_ids

LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"gspo_moe.rollout.{name}")
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "megatron"))
"""


def test_the_client_side_loads_without_megatron() -> None:
    assert rollout.__file__ is not None
    names = [path.stem for path in Path(rollout.__file__).parent.glob("*.py")]
    assert {"engine", "answers", "bank"} <= set(names)
    names += ["servers.engine", "servers.opening"]
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_stop_strings_of_one_token_are_stop_ids() -> None:
    tokenizer: Any = SimpleNamespace(eos_ids=(2, 3), encode=lambda text: [ord(letter) for letter in text])
    assert make_stop_ids(tokenizer, ()) == {2, 3}
    assert make_stop_ids(tokenizer, ("\n", ";")) == {2, 3, 10, 59}
    assert make_stop_ids(tokenizer, ("ab",)) == {2, 3}
    with pytest.raises(ConfigError, match=r"rollout\.stop: '' is in every answer; leave it out"):
        make_stop_ids(tokenizer, ("",))
