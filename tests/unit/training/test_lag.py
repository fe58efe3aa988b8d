"""Whole RL steps on answers of servers that run ahead: what the figures say of old and of new tokens.

The servers are the embedded engine, asked with the weights of the moment and told nothing of later ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.config.loading import load_config
from gspo_moe.observability.catalog import describe
from gspo_moe.rollout.engine import Request
from gspo_moe.rollout.servers.records import Answer, Ask, Post
from gspo_moe.training.preflight import preflight
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer, open_session
from gspo_moe.types import Reward
from tests.policy import trainer_of
from tests.unit.training.test_rl import SMALL


class Embedded:
    """`Servers` that answer at once, but to the prompts in `held`, of whose answers they sample one token.

    These `publish` breaks off.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self.held = engine, set[str]()
        self._waiting: list[tuple[Future[Answer], Answer]] = []

    def submit(self, ask: Ask) -> Future[Answer]:
        request = Request(f"{ask.uid}/{ask.sample_index}", ask.token_ids, samples=1)
        ((one,),) = self._engine.generate([request], replace(ask.params, max_response_tokens=ask.max_tokens))
        sampled, finish = one.token_ids[len(ask.token_ids) :], one.finish
        routes = None if one.routes is None else one.routes.numpy()
        whole = Answer(sampled, one.log_probs, finish, self._engine.version, routes)
        future: Future[Answer] = Future()
        if ask.uid not in self.held or len(sampled) == 1:
            future.set_result(whole)
        else:
            broken = replace(whole, token_ids=sampled[:1], log_probs=one.log_probs[:1], finish="abort")
            if routes is not None:
                broken = replace(broken, routes=routes[: len(ask.token_ids)])
            self._waiting.append((future, broken))
        return future

    def publish(self) -> None:
        """Behind a step, whose weights the engine has."""
        self.held.clear()
        for future, answer in self._waiting:
            future.set_result(answer)

    def everywhere(self, post: Post) -> list[Any]:
        raise NotImplementedError

    def close(self) -> None:
        pass


@contextlib.contextmanager
def opened(folder: Path, max_staleness: int, *overrides: str) -> Iterator[Trainer]:
    given = [*SMALL, "routing.engine_routes=true", f"logging.run_dir={folder}", *overrides]
    session = open_session(preflight(load_config(None, given)))
    rollout = session.config.rollout.model_copy(update={"max_staleness": max_staleness})
    session.plan = replace(session.plan, config=session.config.model_copy(update={"rollout": rollout}))
    servers: Any = SimpleNamespace(fleet=Embedded(session.answerer.engine))
    session.servers = servers
    pool: Any = session.answerer.pool
    pool.rewards = lambda items: [Reward(sum(map(ord, turns[-1].text)) % 3) for _, turns in items]
    with trainer_of(session) as trainer:
        yield trainer


def test_the_figures_by_lag_tell_engines_that_differ_from_policies_that_moved(tmp_path: Path) -> None:
    with opened(tmp_path, 1) as trainer:
        first, second, third = (rl_step(trainer).metrics for _ in range(3))
    for metrics in (first, second, third):
        for name in metrics:
            describe(name)
    assert (first["lag/mean"], second["lag/mean"], third["lag/max"]) == (0, 1, 1)
    assert (first["lag/tokens/lag_0"], first["lag/tokens/lag_1"], second["lag/tokens/lag_1"]) == (1, 0, 1)
    assert first["mismatch/k3/lag_0"] == pytest.approx(first["mismatch/k3"], abs=1e-15)
    assert first["mismatch/k3/lag_0"] < 1e-9 < 1e-5 < second["mismatch/k3/lag_1"], "one engine, and a policy that moved"
    assert second["mismatch/k3/lag_1"] == pytest.approx(second["mismatch/k3"], rel=1e-9)
    assert "mismatch/k3/lag_0" not in second
    assert first["routing/engine/slot_change/lag_0"] == 0 < second["routing/engine/slot_change/lag_1"]
    assert "routing/engine/noise_floor/slot_change" in first
    assert "routing/engine/noise_floor/slot_change" not in second, "no floor where weights are not the same"
    # Ratios are of the step's own policy, not of the one that sampled: in the first mini-batch they are 1.
    for metrics in (first, second):
        assert metrics["routing/staleness/slot_change/mini_batch_1"] == 0
    assert (first["queue/ready"], first["queue/running"]) == (4, 0)


@pytest.mark.parametrize(
    "old_log_probs", [(), ("algorithm.old_log_probs=rollout", "routing.record=false", "routing.engine_routes=false")]
)
def test_an_answer_of_two_policies_is_taken_apart(old_log_probs: tuple[str, ...], tmp_path: Path) -> None:
    """Of the second step's answers the first token is of the first policy, the rest of the step's own."""
    with opened(tmp_path, 1, *old_log_probs) as trainer:
        servers: Any = trainer.session.servers
        servers = servers.fleet
        servers.held = {f"train/{index}" for index in range(4, 8)}
        first = rl_step(trainer).metrics
        servers.publish()
        outcome = rl_step(trainer)
    assert (first["queue/ready"], first["queue/running"]) == (0, 4)
    rollouts = [one for group in outcome.batch.groups for one in group.rollouts]
    assert all(one.versions in (((0, 1), (4, len(one.log_probs) - 1)), ((0, 1),)) for one in rollouts)
    metrics, tokens = outcome.metrics, sum(len(one.log_probs) for one in rollouts)
    assert metrics["lag/tokens"] == metrics["lag/tokens/lag_1"] == pytest.approx(len(rollouts) / tokens)
    assert metrics["mismatch/k3/lag_0"] < 1e-9 < 1e-5 < metrics["mismatch/k3/lag_1"]
    share = metrics["lag/tokens/lag_1"]
    if not old_log_probs:
        mean = share * metrics["mismatch/k3/lag_1"] + (1 - share) * metrics["mismatch/k3/lag_0"]
        assert metrics["mismatch/k3"] == pytest.approx(mean, rel=1e-6)
        # A row of routes is of the pass that its next token was drawn from, whoever drew the tokens before it.
        assert metrics["routing/engine/slot_change/lag_0"] == 0
        assert "routing/engine/slot_change/lag_1" not in metrics, "the first token's row is the prompt's last"
        assert metrics["ratio/token_max"] != 1
