"""Two checkpoints of one architecture over the same texts, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.watching.comparison import Comparison, compare
from gspo_moe.watching.memory import free_memory
from gspo_moe.watching.snapshot import Snapshot, join
from gspo_moe.watching.streaming import stream, tensor_files
from gspo_moe.watching.texts import Batch
from gspo_moe.watching.watcher import watch

STREAMED = "qwen3_moe"  # its config's model_type
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROOM = 0.8  # of the free memory that weights may take, beside activations


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder and how to run it. dtype: a key of `DTYPES`. streamed: one layer at a time."""

    folder: Path
    dtype: str
    device: str
    streamed: bool


def choose_source(folder: Path, dtype: str | None, device: str, stream_it: bool) -> Source:
    """dtype: None for the config's own. Streams what does not fit into memory.

    Raises ConfigError where such a model is of a kind that cannot be streamed, DataError for no model's folder.
    """
    config = load_config(folder)
    files = set(tensor_files(folder).values())
    own = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    chosen = dtype or own
    if chosen not in DTYPES:
        raise ConfigError(f"{folder} is of {chosen}; give --dtype {', '.join(DTYPES)}")
    widths = [torch.finfo(DTYPES[one]).bits for one in (chosen, own if own in DTYPES else chosen)]
    size = sum(file.stat().st_size for file in files) * widths[0] / widths[1]
    free = free_memory(device)
    if not stream_it and size <= ROOM * free:
        return Source(folder, chosen, device, False)
    if config.model_type != STREAMED:
        raise ConfigError(
            f"{folder}: {size / 1e9:.1f} GB of weights in {chosen}, {free / 1e9:.1f} GB free on {device}, and only "
            f"{STREAMED} runs layer by layer, not {config.model_type}; use another machine, or --dtype bfloat16"
        )
    return Source(folder, chosen, device, True)


def load_config(folder: Path) -> Any:
    """transformers' config of a folder. Raises DataError where there is none that it reads."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():  # else transformers would look for such a name on the network
        raise DataError(f"{folder} has no config.json; give a Hugging Face model's folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is no model's folder that transformers reads ({str(error).splitlines()[0]})"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """A folder's own tokenizer as transformers reads it; None where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def compare_sources(old: Source, new: Source, batches: Sequence[Batch]) -> tuple[Comparison, tuple[str, ...]]:
    """The figures of both over these batches, phi and W among them, and the names of the routers."""
    before, _ = snapshots(old, batches, None)
    after, held = snapshots(new, batches, before)
    return compare(before, after, held), before.layers


def snapshots(source: Source, batches: Sequence[Batch], held: Snapshot | None) -> tuple[Snapshot, Snapshot | None]:
    """Of all batches, joined: own routes, and those of `held` where it is given."""
    moved = [batch.to(source.device) for batch in batches]
    dtype = DTYPES[source.dtype]
    if source.streamed:
        return stream(source.folder, load_config(source.folder), moved, held, dtype, source.device)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).to(source.device).eval()
    watcher = watch(model)

    def taken(batch: Batch, routes: torch.Tensor | None) -> Snapshot:
        masks = (batch.attention_mask, batch.response_mask)
        return watcher.snapshot(batch.input_ids, *masks, routes=routes, use_cache=False)

    own = join([taken(batch, None) for batch in moved])
    if held is None:
        return own, None
    parts = held.routes_TLK.split([batch.input_ids.numel() for batch in moved])
    return own, join([taken(batch, part) for batch, part in zip(moved, parts, strict=True)])
