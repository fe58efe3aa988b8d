"""What one rank alone found, or a signal that it alone got, ends every rank at the same place."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_moe.errors import Interrupted, RolloutError
from gspo_moe.last_words import of_the_system
from gspo_moe.model.weights import RandomSource
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.samples import Samples
from gspo_moe.training import loop
from gspo_moe.training.resuming import open_trainer
from gspo_moe.training.roll_backs import FILE as ROLL_BACKS_FILE
from gspo_moe.training.watch import Watch
from tests.launch import launch
from tests.policy import SIZES, requests, sampling
from tests.qwen3 import built, layout
from tests.unit.training.test_rl import opened


def _stop() -> None:
    with built(SIZES, layout(2, expert=2), RandomSource(SIZES, seed=2)) as model:
        engine, last = MegatronEngine(model, 8, 64), dist.get_rank() == 1
        raise_everywhere(None)
        with pytest.raises(RolloutError, match="prompt train/0 is empty"):
            engine.generate(requests(1, [()] if last else [(1, 2)]), sampling())
        if last:
            with torch.no_grad():
                model.gpt_chunks[0].output_layer.weight[4, 4] = float("nan")
        with pytest.raises(RolloutError, match="logits are not finite"):
            engine.generate(requests(2, [(1, 2), (3,)]), sampling())

        with StopSignals() as stop:
            stop.check()
            if last:
                os.kill(os.getpid(), signal.SIGUSR1)
            with pytest.raises(Interrupted, match="ended by SIGUSR1") as caught:
                stop.check()
        assert caught.value.exit_code == 0
        stop.check()


def _stop_alone() -> None:
    """Ranks that share no experts decode at their own pace, and still stop together."""
    with built(SIZES, layout(2), RandomSource(SIZES, seed=2)) as model, StopSignals() as stop:
        engine, last = MegatronEngine(model, 8, 128, stop), dist.get_rank() == 1
        asked, params = requests(1, [(1, 2)] if last else [(1, 2), (3,)]), sampling(longest=80, stop_ids=frozenset())
        assert [len(group) for group in engine.generate(asked, params)] == [1] * len(asked)
        decoded = _count_tokens(engine)
        if last:
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match="ended by SIGUSR1"):
            engine.generate(asked, params)
        assert decoded == [64 if last else 80]


def _count_tokens(engine: MegatronEngine) -> list[int]:
    """Filled with the tokens that each batch sampled, once it is over."""
    counts, gather = list[int](), engine._gather_routes

    def counted(samples: Samples, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        counts.append(samples.tokens)
        return gather(samples, prompts)

    engine._gather_routes = counted  # type: ignore[method-assign]
    return counts


def _write_alone(folder: Path) -> None:
    """What the first rank alone writes or removes as a run starts lies under a folder of its name."""
    with opened(folder) as trainer:
        for name in (ROLL_BACKS_FILE, "starts.jsonl"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with pytest.raises(IsADirectoryError, match=ROLL_BACKS_FILE) as caught:
            open_trainer(trainer.session)
        told = of_the_system(caught.value)
        assert str(told) == f"{folder / ROLL_BACKS_FILE}: Is a directory; name another path, or see to its permissions"
        with pytest.raises(IsADirectoryError, match="starts"):
            loop._run(trainer, Watch(trainer))


@pytest.mark.parametrize("body", [_stop, _stop_alone])
def test_ranks_stop_together(body: Callable[[], None]) -> None:
    launch(body, 2)


def test_ranks_fail_alike_where_the_first_alone_writes(tmp_path: Path) -> None:
    launch(_write_alone, 2, tmp_path)
