"""Models of a few thousand parameters, and servers of them: the stand-in, and a real vLLM where one is told of.

`GSPO_MOE_VLLM_URL=http://HOST:PORT pytest -m vllm` has the contract tests ask that one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gspo_moe.rollout.servers.checking import Sizes
from gspo_moe.rollout.servers.vllm import Vllm
from tests.qwen3 import architecture, reference_model
from tests.support.stand_in import Running

URL = "GSPO_MOE_VLLM_URL"
TINY = Vllm(Sizes(vocab=architecture().vocab_size, layers=2, experts=8, topk=2))


@dataclass(frozen=True)
class Contract:
    """url: of a server whose model lies where this machine sees it too."""

    url: str


def write_model(folder: Path, seed: int) -> Path:
    reference_model(architecture(), seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two models of `architecture()` with other weights."""
    folder = tmp_path_factory.mktemp("tiny_models")
    return write_model(folder / "one", 1), write_model(folder / "two", 2)


@pytest.fixture
def stand_ins(tiny_models: tuple[Path, Path]) -> Iterator[list[Running]]:
    """Two servers of the first model."""
    running = [Running(tiny_models[0], routes=True) for _ in range(2)]
    yield running
    for one in running:
        one.stop()


@pytest.fixture(scope="module", params=["stand_in", pytest.param("vllm", marks=pytest.mark.vllm)])
def contract(request: pytest.FixtureRequest, tiny_models: tuple[Path, Path]) -> Iterator[Contract]:
    if request.param == "vllm":
        if URL not in os.environ:
            pytest.skip(f"no {URL}: start one as docs/servers.md says")
        yield Contract(os.environ[URL])
        return
    running = Running(tiny_models[0], routes=True)
    yield Contract(running.url)
    running.stop()
