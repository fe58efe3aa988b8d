"""The README's Python, as a new user pastes it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REWARD, SNIPPET = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_example_of_ones_own_data_is_shown_as_it_is() -> None:
    example = ROOT / "examples/own_data"
    assert (example / "my_reward.py").read_text(encoding="utf-8").endswith(REWARD)
    (record,) = re.findall(r"```jsonl\n(.*?)```", TEXT, flags=re.DOTALL)
    assert (example / "prompts.jsonl").read_text(encoding="utf-8").startswith(record)


def test_the_library_snippet_runs_as_it_stands() -> None:
    names: dict[str, Any] = {}
    exec(SNIPPET, names)
    # A = 1/sqrt(2) has mean log-ratio 0.05, clipped; A = -1/sqrt(2) has mean 0, so -A/3 a token, halved by N = 2.
    a = 0.5**0.5
    assert names["found"].loss.item() == pytest.approx((-1.0004 * a + a) / 2, abs=1e-6)
    assert names["log_probs"].grad.tolist() == pytest.approx([0, 0, a / 6, a / 6, a / 6], abs=1e-6)
    last = SNIPPET.strip().splitlines()[-1].split("#")[0]
    assert eval(last, names) == 0.5
    assert isinstance(names["found"].loss, torch.Tensor)
