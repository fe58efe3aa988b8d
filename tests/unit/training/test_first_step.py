"""What the first step says of engine and trainer."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.training.first_step import tell_first_step, verdict


@pytest.mark.parametrize(
    ("k3", "engine", "trainer", "fine"),
    [
        (3e-9, "fp32", "fp32", True),
        (1e-4, "fp32", "fp32", False),
        (1e-4, "bf16", "fp32", True),
        (1e-4, "fp32", "bf16", True),
        (1e-4, "bf16 and fp32", "fp32", True),
        (0.3, "bf16", "bf16", False),
        (0.03, "fp8_rounded", "fp32", True),
        (0.03, "bf16", "fp32", False),
        (float("nan"), "fp32", "fp32", False),
    ],
)
def test_the_coarser_side_says_what_is_allowed(k3: float, engine: str, trainer: str, fine: bool) -> None:
    said, is_fine = verdict(k3, "vllm", engine, trainer)
    assert is_fine is fine
    assert f"vllm ({engine}) against the trainer ({trainer})" in said


def session(servers: str | None, **rollout: Any) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(
            stage="rl",
            rollout=SimpleNamespace(**{"bank": None, "engine": "vllm", "numerics": "trainer", **rollout}),
            model=SimpleNamespace(dtype="fp32"),
            logging=SimpleNamespace(progress=True),
        ),
        groups=SimpleNamespace(is_main=True),
        servers=None if servers is None else SimpleNamespace(dtype=servers),
    )


def test_servers_are_told_of_and_the_trainers_own_engine_only_where_it_is_wrong(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tell_first_step(session("bf16"), {"mismatch/k3": 2e-4})
        tell_first_step(session(None), {"mismatch/k3": 2e-12})
        tell_first_step(session(None, bank="b"), {"mismatch/k3": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "first step: mismatch/k3 0.0002 nats a token, vllm (bf16) against the trainer (fp32): as these numerics allow "
        "(up to 0.01)"
    ]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        tell_first_step(session(None), {"mismatch/k3": 2e-2})
    assert "more than these numerics allow (1e-06)" in caplog.text
