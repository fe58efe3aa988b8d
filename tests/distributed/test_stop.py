"""What one rank alone found, or a signal that it alone got, ends every rank at the same place."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist

from gspo_moe.errors import Interrupted, RolloutError
from gspo_moe.model.weights import RandomSource
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.samples import Samples
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


@pytest.mark.parametrize("body", [_stop, _stop_alone])
def test_ranks_stop_together(body: Callable[[], None]) -> None:
    launch(body, 2)
