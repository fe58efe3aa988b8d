"""What one rank alone found, or a signal that it alone got, ends every rank at the same place."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from gspo_moe.errors import Interrupted, RolloutError
from gspo_moe.model.weights import RandomSource
from gspo_moe.parallel.stop import StopSignals, raise_everywhere
from gspo_moe.rollout.embedded.engine import MegatronEngine
from tests.launch import launch
from tests.policy import SIZES, requests, sampling
from tests.qwen3 import built, layout


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
        assert caught.value.exit_code == 128 + signal.SIGUSR1
        stop.check()


def test_ranks_stop_together() -> None:
    launch(_stop, 2)
