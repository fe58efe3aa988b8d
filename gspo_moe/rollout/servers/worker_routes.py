"""Routes from a vLLM on a CPU: has its model runner feed vLLM's own recorder of routed experts, as its GPU runner does.

vLLM 0.32 records each MoE layer's top-k, keeps them with the blocks of the prefix cache, and answers with
`routed_experts`; of that only its newer model runner, which needs Triton, does its part. Here the CPU's runner does it.
`vllm_cpu` has vLLM let `--enable-return-routed-experts` pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


@dataclass(frozen=True)
class Rows:
    """Of a forward pass, what vLLM's recorder asks of a batch: whose rows, and which positions, they are.

    num_computed_tokens_np [requests]: tokens in front of a request's first row.
    query_start_loc_np [requests + 1]: the first row of each request.
    """

    req_ids: list[str]
    num_computed_tokens_np: np.ndarray
    query_start_loc_np: np.ndarray


def record_routes() -> None:
    """Changes the class, so call it before vLLM makes a model runner, and once."""
    initialize, execute, sample = (
        CPUModelRunner.initialize_kv_cache,
        CPUModelRunner.execute_model,
        CPUModelRunner.sample_tokens,
    )

    @functools.wraps(initialize)
    def initialize_kv_cache(self: Any, kv_cache_config: Any, is_profiling: bool = False, **others: Any) -> None:
        initialize(self, kv_cache_config, is_profiling, **others)
        self.aux_connector, self.aux_pending = None, None
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            self.aux_connector = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *others: Any) -> Any:
        if self.aux_connector is None:
            return execute(self, scheduler_output, *others)
        self.aux_connector.begin_step(scheduler_output.aux_output_connector_metadata)
        output = execute(self, scheduler_output, *others)
        if output is None:  # a forward pass has been, of which sample_tokens makes the output
            self.aux_pending = self.aux_connector.prepare_output(_rows(self))
        return output

    @functools.wraps(sample)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        with _unfinished_prompts_draw_nothing(self):
            output = sample(self, grammar_output)
        if self.aux_connector is not None and self.aux_pending is not None:
            pending, self.aux_pending = self.aux_pending, None
            assert output.req_ids == pending.request_ids
            sampled = np.array([len(ids) for ids in output.sampled_token_ids])
            pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            output.aux_output_connector_output = pending.process_output()
        return output

    CPUModelRunner.initialize_kv_cache = initialize_kv_cache
    CPUModelRunner.execute_model = execute_model
    CPUModelRunner.sample_tokens = sample_tokens


@contextlib.contextmanager
def _unfinished_prompts_draw_nothing(runner: Any) -> Iterator[None]:
    """Keeps seeded generators from the rows whose token is thrown away, as their prompt goes on in the next pass.

    vLLM turns such a generator back after the draw, which a CPU's cannot be, so that a prompt in two parts ends the
    server.
    """
    batch = runner.input_batch
    mask = runner.discard_request_mask.np[: batch.num_reqs]
    held = {index: batch.generators.pop(index) for index in list(batch.generators) if mask[index]}
    try:
        yield
    finally:
        batch.generators.update(held)


def _rows(runner: Any) -> Rows:
    batch = runner.input_batch
    count = batch.num_reqs
    return Rows(
        list(batch.req_ids),
        batch.num_computed_tokens_cpu[:count].copy(),
        runner.query_start_loc.np[: count + 1].copy(),
    )
