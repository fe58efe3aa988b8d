"""Do rollout engine and trainer agree as well as their numerics let them? The first step of every start tells."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from gspo_moe.config.schema import Config
from gspo_moe.training.session import Session

# Of mismatch/k3 at equal weights, where neither side is coarser: about ten times what docs/asynchrony.md measured.
ALLOWED = {"fp32": 1e-6, "bf16": 1e-2, "fp8_rounded": 5e-2}
_log = logging.getLogger(__name__)


def tell_first_step(session: Session, metrics: Mapping[str, float]) -> None:
    """Says on the main process what the step's `mismatch/k3` is worth; of the trainer's own engine, if it is too much.

    metrics: of the first step since this process started, whose answers are all of the weights it began with.
    """
    if session.config.stage != "rl" or session.config.rollout.bank is not None or not session.groups.is_main:
        return
    engine = session.servers.dtype if session.servers is not None else _embedded(session.config)
    said, is_fine = verdict(metrics["mismatch/k3"], session.config.rollout.engine, engine, session.config.model.dtype)
    if not is_fine:
        _log.warning("%s", said)
    elif session.servers is not None and session.config.logging.progress:
        print(said, file=sys.stderr, flush=True)


def _embedded(config: Config) -> str:
    return config.model.dtype if config.rollout.numerics == "trainer" else config.rollout.numerics


def verdict(k3: float, name: str, engine: str, trainer: str) -> tuple[str, bool]:
    """In words, and whether it is what these numerics allow. engine, trainer: their numerics, words
    of `ALLOWED`; what is none of them is taken for bf16.
    """
    both = f"{engine} {trainer}".split()
    allowed = max(ALLOWED.get(one, ALLOWED["bf16"]) for one in both)
    said = f"first step: mismatch/k3 {k3:.2g} nats a token, {name} ({engine}) against the trainer ({trainer})"
    if k3 <= allowed:
        return f"{said}: as these numerics allow (up to {allowed:g})", True
    return (
        f"{said}: more than these numerics allow ({allowed:g}). Other weights, another temperature or another "
        "architecture in the engine look like this; nothing that is learnt from it is to be trusted"
    ), False
