"""`gspo-moe score`: log-probs (and routes) of the sequences in a JSONL file, in any parallel layout."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo_moe.config.checks import check_files, check_vocabulary
from gspo_moe.config.layout import check_layout
from gspo_moe.config.outputs import output_fault
from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.schedule import plan_microbatches
from gspo_moe.data.tokenizers import own_tokenizer
from gspo_moe.errors import DataError, RolloutError
from gspo_moe.files import write_whole
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.initial import load_hf
from gspo_moe.parallel.groups import initialize, world_size_from_environment
from gspo_moe.parallel.reduce import from_last_stage, gather_over_data
from gspo_moe.parallel.stop import on_main
from gspo_moe.platform import choose_backends, device, megatron_version
from gspo_moe.routing.comparison import gather_layers
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.scoring.lines import read_sequences
from gspo_moe.scoring.score import score
from gspo_moe.types import TrainingSample


def score_file(config: Config, data: Path, output: Path, *, with_routes: bool) -> None:
    """Writes for each line of `data` a line `{"log_probs": [...]}` to `output`, in order.

    A line is `{"token_ids": [...]}`, `{"text": "..."}` as the tokenizer reads it, or `{"messages": [...]}` through the
    chat template; the output of the latter two has `token_ids` and `mask` as well, 1 on what an assistant says.
    log_probs: one value (nats, temperature 1) for each token after the first. With routes, `routes` has one entry a
    log-prob: the experts [layer][slot] that the position which predicted that token picked. Rows of the model that
    the tokenizer has no token for, `tokenizer.path`'s or the model's own, have no probability; without one, every row.
    Raises DataError, naming the line, for what is no such line or does not fit the model, and for an `output` that
    cannot be written; RolloutError, naming the line, where a log-prob is not finite, and leaves `output` as it was.
    """
    check_files(config, run_folder=False)
    fault = output_fault(output)
    if fault is not None:
        raise DataError(fault)
    if not output.parent.is_dir():
        raise DataError(f"{output} cannot be written; give a file in a folder that exists")
    architecture = config.model.architecture()
    tokenizer = own_tokenizer(config.tokenizer, config.model.folder)
    vocab = architecture.vocab_size if tokenizer is None else tokenizer.vocab_size
    check_vocabulary(vocab, architecture)
    renderer = None if tokenizer is None else Renderer(tokenizer, config.chat)
    lines = list(read_sequences(data, vocab, architecture.max_positions, renderer))
    world_size = world_size_from_environment()
    layout = check_layout(config, architecture, world_size, megatron_version())
    choose_backends(dict(config.model.backend), config.model.dtype)
    groups = initialize(layout, config.seed, config.parallel.timeout_minutes)
    model = build_model(config, architecture, groups, vocab=vocab)
    assert config.model.hf is not None
    load_hf(model, Path(config.model.hf))
    sequences = [line.token_ids for line in lines]
    records = _score(model, sequences, config.schedule.micro_batch_tokens, with_routes)
    _check_finite(records, data)
    records = [record | line.shown for record, line in zip(records, lines, strict=True)]
    on_main(lambda: write_whole(output, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)))


def _check_finite(records: Sequence[dict[str, Any]], data: Path) -> None:
    for number, record in enumerate(records, start=1):
        for position, log_prob in enumerate(record["log_probs"], start=1):
            if not math.isfinite(log_prob):
                raise RolloutError(
                    f"{data}, line {number}: the log-prob of token {position} (from 0) is {log_prob}; the model's "
                    "weights are too large for model.dtype, or broken; give others"
                )


def _score(
    model: Model, sequences: Sequence[tuple[int, ...]], token_budget: int, with_routes: bool
) -> list[dict[str, Any]]:
    """A record for each sequence, on every rank. Collective."""
    records: dict[int, dict[str, Any]] = {
        i: {"log_probs": []} | ({"routes": []} if with_routes else {}) for i in range(len(sequences))
    }
    scored = [i for i, ids in enumerate(sequences) if len(ids) > 1]
    groups = model.groups
    # Every data-parallel rank needs work: short files are filled up with repeats, whose results are the same.
    indices = scored + [scored[0]] * (-len(scored) % groups.layout.data) if scored else []
    if not indices:
        return list(records.values())
    lengths = [len(sequences[i]) - 1 for i in indices]
    budget = max(token_budget, max(lengths))
    mine = plan_microbatches(lengths, groups.layout.data, budget)[groups.data_rank]
    samples = [TrainingSample(sequences[i], (0,) + (1,) * (len(sequences[i]) - 1)) for i in indices]
    packs = [pack(samples, chosen).to(device().torch_device) for chosen in mine]
    recorder = RouteRecorder(model.chunks, model.architecture, groups)
    routing = recorder.start() if with_routes else None
    log_probs = from_last_stage([log_probs_T.tolist() for log_probs_T in score(model, packs, record=routing)], groups)
    recordings = [] if routing is None else routing.recordings()
    routes = [gather_layers(one.routes_TLK, recorder.layers).tolist() for one in recordings]
    found: list[tuple[int, dict[str, Any]]] = []
    for number, one in enumerate(packs):
        bounds = one.cu_seqlens.tolist()
        for sample, start, stop in zip(one.sample_indices, bounds, bounds[1:], strict=False):
            record = {"log_probs": log_probs[number][start:stop]}
            if with_routes:
                record["routes"] = routes[number][start:stop]
            found.append((indices[sample], record))
    for part in gather_over_data(found, groups):
        records.update(dict(part))
    return [records[i] for i in range(len(sequences))]
