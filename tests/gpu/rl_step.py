"""One RL step of a small model with everything that a GPU run has, for `tests/gpu` and its proof on the CPU."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gspo_moe.config.schema import Config
from gspo_moe.parallel.groups import shut_down
from gspo_moe.tasks.pool import Item, TaskPool
from gspo_moe.tasks.protocol import last_answer
from gspo_moe.tasks.rewards import Reward
from gspo_moe.training.checkpoint import load_checkpoint, save_checkpoint
from gspo_moe.training.preflight import preflight
from gspo_moe.training.resuming import open_trainer
from gspo_moe.training.rl import rl_step
from gspo_moe.training.session import Trainer, open_session
from tests.launch import renew_port


class Variety(TaskPool):
    """Rewards any answer by its distinct characters, so that a model that knows nothing has something to learn."""

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        return [Reward(len(set(last_answer(turns))) / 10) for _, turns in items]


def settings(folder: Path, backend: str, parallel: dict[str, int]) -> Config:
    """Two mini-batches; sizes that grouped matrix products and fused attention take."""
    return Config.model_validate(
        {
            "model": {"preset": "tiny", "dtype": "bf16", "backend": backend, "overrides": {"head_dim": 64}},
            "parallel": {"distributed_optimizer": True, "recompute": "selective", **parallel},
            "algorithm": {"mini_batches": 2},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 12},
            "routing": {"router_dtype": "fp32"},
            "optimizer": {"lr": 1e-2},
            "schedule": {"steps": 2, "micro_batch_tokens": 256},
            "evaluation": {"prompts": 0},
            "logging": {"run_dir": str(folder), "progress": False},
        }
    )


def step_save_and_load(folder: Path, backend: str, parallel: dict[str, int] | None = None) -> None:
    """Takes a step, saves, spoils the weights, loads, and takes another step. Collective."""
    config = settings(folder, backend, parallel or {})
    session = open_session(preflight(config))
    session.close()
    session.answerer = replace(session.answerer, pool=Variety(config.task, config.seed))
    try:
        trainer = open_trainer(session)
        before = copies(trainer)
        check_step(trainer)
        after = copies(trainer)
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert sum(changed) > len(changed) / 2, "all but what met no token should have moved"
        path = save_checkpoint(trainer.checkpoints, session.model, trainer.optimizer, trainer.progress, keep=1)
        with torch.no_grad():
            for parameter in parameters(trainer):
                parameter.zero_()
        assert load_checkpoint(path, session.model, trainer.optimizer) == trainer.progress
        assert all(torch.equal(a, b) for a, b in zip(after, parameters(trainer), strict=True))
        check_step(trainer)
    finally:
        session.close()
        shut_down()


def step_twice(folder: Path, backend: str) -> None:
    """Takes the same step from the same weights twice, which is to give the same bits. Collective."""
    found = []
    for name in ("once", "again"):
        config = settings(folder / name, backend, {})
        session = open_session(preflight(config))
        session.close()
        session.answerer = replace(session.answerer, pool=Variety(config.task, config.seed))
        try:
            trainer = open_trainer(session)
            check_step(trainer)
            found.append(copies(trainer))
            renew_port()
        finally:
            session.close()
            shut_down()
    assert all(torch.equal(once, again) for once, again in zip(*found, strict=True))


def check_step(trainer: Trainer) -> None:
    metrics = rl_step(trainer).metrics
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["optimizer/skipped_updates"] == 0
    assert metrics["optimizer/grad_norm"] > 0
    assert 0 < metrics["ratio/sequence_std"] < 1, "the second mini-batch is off-policy"
    assert metrics["mismatch/k3"] < 0.01, "rollout and training disagree"


def parameters(trainer: Trainer) -> list[torch.nn.Parameter]:
    return [parameter for chunk in trainer.session.model.chunks for parameter in chunk.parameters()]


def copies(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters(trainer)]
