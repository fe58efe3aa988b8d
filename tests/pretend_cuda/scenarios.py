"""What runs on the pretended GPU. Imports this project and megatron-core, so `device.install` comes before it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_moe.model.build import Model, build_model
from gspo_moe.model.weights import load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.packs import microbatches, pack_share
from tests.gpu.golden import BF16, FP32, LENGTHS, PROMPTS, SIZES, Tolerance, samples, settings, weights
from tests.gpu.rl_step import step_save_and_load
from tests.gpu.test_golden import check_an_empty_pack, check_golden
from tests.policy import score_and_record
from tests.pretend_cuda.tensor import CudaTensor
from tests.pretend_cuda.waits import counted, launches
from tests.qwen3 import Tensors, layout
from tests.steps import train_minibatch

Waits = Counter[tuple[str, str]]


def golden(dtype: str, tolerance: Tolerance) -> Callable[[], Waits]:
    def check() -> Waits:
        with counted() as found:
            check_golden(1, {}, dtype, "local", tolerance)
        return found

    return check


def empty_pack() -> Waits:
    with counted() as found:
        check_an_empty_pack("fp32", "local")
    return found


def rl_step() -> Waits:
    with tempfile.TemporaryDirectory() as folder, counted() as found:
        step_save_and_load(Path(folder), "local")
    return found


def _model() -> tuple[Model, Any]:
    config = settings("bf16", "local")
    model = build_model(config, SIZES, initialize(layout(), seed=1))
    load_weights(model, Tensors(weights()))
    assert all(isinstance(parameter, CudaTensor) for parameter in model.chunks[0].parameters())
    return model, config


def decode_step() -> Waits:
    """Sixteen more tokens for each sequence of a batch: what 25 tokens wait for, and launch, more than 9 do."""
    model, _ = _model()
    requests = [Request(str(number), ids, samples=2) for number, ids in enumerate(PROMPTS)]

    def generate(tokens: int) -> tuple[Waits, int]:
        params = SamplingParams(1.0, 1.0, 0, tokens, stop_ids=frozenset(), seed="")
        before = launches.total()
        with counted() as found:
            MegatronEngine(model, max_batch=8, prefill_tokens=64).generate(requests, params)
        return found, launches.total() - before

    generate(9)
    (few, launched), (many, launched_more) = generate(9), generate(25)
    shut_down()
    return many - few + Waits({("launch", "16 tokens:0:decode_step"): launched_more - launched})


def training_step() -> Waits:
    """One mini-batch of GSPO: forward and backward of its packs, and the update."""
    model, config = _model()
    recorder = RouteRecorder(model.chunks, SIZES, model.groups)
    optimizer = Optimizer(config, model, total_updates=2)
    packs = microbatches(pack_share(samples(), model.groups, config))
    old, _ = score_and_record(model, packs, recorder)

    num_tokens = int(sum(pack.response_mask_T.sum() for pack in packs))
    given = model, optimizer, packs, old, config.algorithm, len(LENGTHS), 1.0

    def step() -> Waits:
        with counted() as found:
            train_minibatch(*given, recorder, num_tokens=num_tokens)
        return found

    step()
    found = step()
    shut_down()
    return found


SCENARIOS: dict[str, Callable[[], Waits]] = {
    "golden_fp32": golden("fp32", FP32),
    "golden_bf16": golden("bf16", BF16),
    "empty_pack": empty_pack,
    "rl_step": rl_step,
    "decode_step": decode_step,
    "training_step": training_step,
}
