"""The README's Python, as a new user pastes it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch


def test_the_library_snippet_runs_as_it_stands() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    # A = 1/sqrt(2) has mean log-ratio 0.05, clipped; A = -1/sqrt(2) has mean 0, so -A/3 a token, halved by N = 2.
    a = 0.5**0.5
    assert names["found"].loss.item() == pytest.approx((-1.0004 * a + a) / 2, abs=1e-6)
    assert names["log_probs"].grad.tolist() == pytest.approx([0, 0, a / 6, a / 6, a / 6], abs=1e-6)
    last = snippet.strip().splitlines()[-1].split("#")[0]
    assert eval(last, names) == 0.5
    assert isinstance(names["found"].loss, torch.Tensor)
