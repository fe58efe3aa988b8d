"""A Qwen3 MoE checkpoint run with one layer's weights in memory, over hidden states of all texts.

Several passes share the layers that are read: a model's own routes, and the same with others held.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gspo_moe.errors import DataError
from gspo_moe.plain_json import parse_json
from gspo_moe.watching.snapshot import Snapshot, join
from gspo_moe.watching.texts import Batch
from gspo_moe.watching.watcher import AT_ONCE, Watcher, log_probs_of

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")  # one by one, as published


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, of those that transformers loads: `model.safetensors`, else the index's.

    Raises DataError where there is neither, or one cannot be read.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{single} cannot be read ({error}); copy it again") from error
    if not index.is_file():
        raise DataError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder with a model's weights")
    try:
        file_of = {name: folder / file for name, file in parse_json(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of safetensors ({error}); copy it again") from error
    for file in file_of.values():
        if not file.is_file():
            raise DataError(f"{file} is not there, which {index.name} names; copy the checkpoint again")
    return file_of


class Tensors:
    """The tensors of a folder's safetensors files by their names, read when asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._file_of = tensor_files(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> torch.Tensor:
        """Raises DataError where it is not there."""
        if name not in self._file_of:
            raise DataError(f"{self._folder} has no tensor {name}; give a whole Qwen3 MoE checkpoint in safetensors")
        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor.to(self._device, self._dtype)

    def below(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All whose names start with `prefix`, which they lose, one at a time."""
        names = [name for name in self._file_of if name.startswith(prefix)]
        for file in dict.fromkeys(self._file_of[name] for name in names):
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    if self._file_of[name] == file:
                        yield name.removeprefix(prefix), opened.get_tensor(name).to(self._device, self._dtype)


@dataclass
class _Pass:
    """One batch on its way through the layers, with the routes that are held in it."""

    batch: Batch
    hidden: torch.Tensor
    held_TLK: torch.Tensor | None
    layers: list[Snapshot]


def stream(
    folder: Path, config: Any, batches: Sequence[Batch], held: Snapshot | None, dtype: torch.dtype, device: str
) -> tuple[Snapshot, Snapshot | None]:
    """Snapshots of all batches, joined: with the model's own routes, and with `held` ones where they are given.

    held: of the same batches, as this function gives them. Raises DataError for a folder that lacks a tensor.
    """
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    tensors = Tensors(folder, dtype, device)
    embedding = tensors.get("model.embed_tokens.weight")
    passes = [_Pass(batch, embedding[batch.input_ids].cpu(), None, []) for batch in batches]
    if held is not None:
        parts = held.routes_TLK.split([batch.input_ids.numel() for batch in batches])
        passes += [replace(one, held_TLK=part, layers=[]) for one, part in zip(passes, parts, strict=True)]
    del embedding
    with torch.device("meta"):
        empty = qwen3.Qwen3MoeForCausalLM(config).eval()
    rotary = qwen3.Qwen3MoeRotaryEmbedding(config=empty.config).to(device)
    with torch.no_grad():
        number = 0
        for index, layer in enumerate(empty.model.layers):
            _fill(layer, index, tensors)
            watcher = Watcher(layer) if isinstance(layer.mlp, qwen3.Qwen3MoeSparseMoeBlock) else None
            for one in passes:
                found = _advance(qwen3, empty.config, layer, watcher, one, rotary, number)
                one.layers += [] if found is None else [_named(found, f"model.layers.{index}.")]
            number += watcher is not None
            layer.to("meta")
        empty.model.norm.load_state_dict({"weight": tensors.get("model.norm.weight")}, assign=True)
        # As transformers 5, which ties nothing where the file has both.
        tied = config.tie_word_embeddings and "lm_head.weight" not in tensors
        head = tensors.get("model.embed_tokens.weight" if tied else "lm_head.weight")
        ends = [_end(empty.model.norm, head, one) for one in passes]
    return join(ends[: len(batches)]), None if held is None else join(ends[len(batches) :])


def _fill(layer: Any, index: int, tensors: Tensors) -> None:
    """A layer's weights, of which no second copy is ever in memory: experts kept one by one are joined as they come."""
    found: dict[str, torch.Tensor] = {}
    one_by_one: set[str] = set()
    for name, tensor in tensors.below(f"model.layers.{index}."):
        expert = EXPERT.fullmatch(name)
        if expert is None or not hasattr(layer.mlp, "experts"):
            found[name] = tensor
        else:
            place = _place(found, layer.mlp.experts, int(expert[1]), expert[2], tensor)
            if place is None or place.shape != tensor.shape:
                raise DataError(f"layer {index}: {name} of {list(tensor.shape)} is not its config's; copy both again")
            place.copy_(tensor)
            one_by_one.add(name)
    if one_by_one:
        experts = range(layer.mlp.experts.num_experts)
        names = [f"mlp.experts.{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up", "down")]
        _refuse_absent(index, [name for name in names if name not in one_by_one])
    try:
        _refuse_absent(index, layer.load_state_dict(found, strict=False, assign=True).missing_keys)
    except RuntimeError as error:  # of shapes
        raise DataError(f"layer {index} is not its config's ({error}); copy both again") from error


def _place(
    found: dict[str, torch.Tensor], experts: Any, expert: int, part: str, like: torch.Tensor
) -> torch.Tensor | None:
    """Where an expert's matrix stands in the layer's own tensors, which are made in `found`; None for one too many."""
    name = "down_proj" if part == "down" else "gate_up_proj"
    shape = getattr(experts, name).shape
    if expert >= shape[0]:
        return None
    whole = found.get(f"mlp.experts.{name}")
    if whole is None:
        whole = found[f"mlp.experts.{name}"] = torch.empty(shape, dtype=like.dtype, device=like.device)
    return whole[expert] if part == "down" else whole[expert].chunk(2)[part == "up"]


def _refuse_absent(index: int, missing: Sequence[str]) -> None:
    if missing:
        raise DataError(f"layer {index} lacks {', '.join(missing)}; give a whole Qwen3 MoE checkpoint in safetensors")


def _advance(
    qwen3: Any, config: Any, layer: Any, watcher: Watcher | None, one: _Pass, rotary: Any, number: int
) -> Snapshot | None:
    """One batch through one layer, of which `number` MoE layers come before; None of a dense one."""
    attention = one.batch.attention_mask
    hidden = one.hidden.to(attention.device)
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    make_mask = qwen3.create_causal_mask if config.sliding_window is None else qwen3.create_sliding_window_causal_mask
    causal = make_mask(
        config=config, inputs_embeds=hidden, attention_mask=attention, past_key_values=None, position_ids=positions
    )
    given = {"attention_mask": causal, "position_ids": positions, "position_embeddings": rotary(hidden, positions)}
    if watcher is None:
        one.hidden = layer(hidden, **given).cpu()
        return None
    held = None if one.held_TLK is None else one.held_TLK[:, number : number + 1]
    with watcher.capture(attention, one.batch.response_mask, routes=held) as captured:
        one.hidden = layer(hidden, **given).cpu()
    return captured.snapshot()


def _named(found: Snapshot, prefix: str) -> Snapshot:
    return replace(found, layers=tuple(prefix + name for name in found.layers))


def _end(norm: torch.nn.Module, head: torch.Tensor, one: _Pass) -> Snapshot:
    """All layers' snapshots as one, with log-probs."""
    ids = one.batch.input_ids
    log_probs = torch.zeros(ids.shape)
    for row in range(len(ids)):
        for start in range(0, ids.shape[1] - 1, AT_ONCE):
            targets = ids[row, start + 1 : start + 1 + AT_ONCE]
            behind = slice(start, start + len(targets))
            logits = norm(one.hidden[row, behind].to(head.device)) @ head.T
            log_probs[row, behind] = log_probs_of(logits, targets)
    return replace(_stack(one.layers), log_probs_T=log_probs.flatten(), token_ids_T=ids.flatten().cpu())


def _stack(layers: Sequence[Snapshot]) -> Snapshot:
    """One snapshot of the layers' own."""
    if not layers:
        raise DataError("no layer of this checkpoint has experts; compare needs a mixture of experts")
    scores = [one.log_scores_MLE for one in layers if one.log_scores_MLE is not None]
    margins = [one.margin_ML for one in layers if one.margin_ML is not None]
    if not len(scores) == len(margins) == len(layers):  # Qwen3's gate is known
        raise DataError("a router's weights are not those of its logits; look for NaN in the checkpoint")
    return replace(
        layers[0],
        routes_TLK=torch.cat([one.routes_TLK for one in layers], dim=1),
        layers=tuple(name for one in layers for name in one.layers),
        log_scores_MLE=torch.cat(scores, dim=1),
        margin_ML=torch.cat(margins, dim=1),
        scored_by=tuple(name for one in layers for name in one.scored_by or ()),
    )
