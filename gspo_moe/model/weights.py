"""Fills the model from HF tensors: a checkpoint's safetensors, or seeded random ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from gspo_moe.config.architecture import Architecture
from gspo_moe.errors import DataError
from gspo_moe.model.build import Model
from gspo_moe.model.fused import as_stored, fused_name, fused_part
from gspo_moe.model.names import EMBEDDING, LM_HEAD, VALUE_HEAD, Entry, Place, entry_of, hf_shapes
from gspo_moe.plain_json import read_object
from gspo_moe.platform import device

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MOST_PROBLEMS = 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TensorSource(Protocol):
    """Whole tensors by HF name. `str()` of it names it in messages."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor it has, as it is stored: `model.fused` has the names of experts stored together."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """One tensor by its name in `hf_shapes`, on the CPU or where the model is; read at this call."""
        ...


class SafetensorsSource:
    """An HF folder: `model.safetensors`, else the shards that `model.safetensors.index.json` names.

    `get` knows the experts one by one, whether the folder has them so or as transformers 5's fused tensors.
    Raises DataError where files are missing or unreadable, or the index and the shards disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._files: dict[str, Any] = {}
        if (self._folder / SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            self._file_of = self._read_index()
        self._shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def __str__(self) -> str:
        return str(self._folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def get(self, name: str) -> torch.Tensor:
        stored, part = (name, None) if name in self._file_of else fused_part(name, self._shapes)
        try:
            if part is not None:
                piece: torch.Tensor = self._slice(stored)[part]
                return piece.squeeze(0)
            tensor: torch.Tensor = self._open(self._file_of[stored]).get_tensor(stored)
        except SafetensorError as error:
            raise DataError(f"{self._folder / self._file_of[stored]}: {stored} cannot be read ({error})") from error
        return tensor

    @property
    def is_bf16(self) -> bool:
        """True where every tensor is."""
        return all(self._slice(name).get_dtype() == "BF16" for name in self._file_of)

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self._folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{self._folder / file} cannot be read ({error}); copy it again") from error
        return self._files[file]

    def _read_index(self) -> dict[str, str]:
        index = self._folder / INDEX_FILE
        if not index.is_file():
            raise DataError(
                f"{self._folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give an HF checkpoint's folder"
            )
        try:
            file_of = read_object(index).get("weight_map")
        except ValueError as error:
            raise DataError(f"{index} is no index of safetensors ({error}); copy it again") from error
        if not isinstance(file_of, dict) or not file_of or not all(map(_is_file_name, file_of.values())):
            raise DataError(
                f"{index} is no index of safetensors: its weight_map must name for each tensor a file of its folder; "
                "copy it again"
            )
        held = {(name, file) for file in set(file_of.values()) for name in self._open(file).keys()}  # noqa: SIM118
        problems = [f"{name}: in {file}, not in the index" for name, file in sorted(held - file_of.items())]
        problems += [f"{name}: not in {file}, where the index has it" for name, file in sorted(file_of.items() - held)]
        if problems:
            raise _error(index, "it and its files do not agree; copy the checkpoint again", problems)
        return file_of


def _is_file_name(value: Any) -> bool:
    """Of the same folder: an index must not lead out of it."""
    return isinstance(value, str) and value == Path(value).name != "" and "\0" not in value


class RandomSource:
    """Fresh weights: norms one, all else N(0, initializer_range^2), each tensor from a generator of its own.

    Drawn on this process's device. A tensor depends only on `seed`, its HF name and the kind of device (the CPU, or a
    model of GPU), so that every layout on the same kind starts from the same model.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self._shapes = hf_shapes(architecture)
        self._deviation = architecture.initializer_range
        self._seed = seed

    def __str__(self) -> str:
        return f"random weights of seed {self._seed}"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def get(self, name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(self._shapes[name], device=device().torch_device)
        return random_tensor(name, self._shapes[name], self._deviation, self._seed)


def random_tensor(name: str, shape: tuple[int, ...], deviation: float, seed: int) -> torch.Tensor:
    """N(0, deviation^2) from a generator of its own, seeded by `seed` and `name`; fp32, on this process's device."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    place = device().torch_device
    generator = torch.Generator(place).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape, device=place).normal_(0.0, deviation, generator=generator)


@dataclass(frozen=True)
class LocalTensor:
    """What this rank has of the HF tensors of one entry: a parameter, or one expert's slice of a stacked one."""

    entry: Entry
    parameter: torch.nn.Parameter
    expert: int | None = None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """This part of a tensor of the parameter's shape."""
        return values if self.expert is None else values[self.expert]


def local_tensors(model: Model) -> Iterator[LocalTensor]:
    """Everything of this rank that HF's model has, with its entry in the table of names."""
    shapes = hf_shapes(model.architecture)
    for chunk in model.gpt_chunks:
        groups = chunk.pg_collection
        place = Place(
            tensor=(groups.tp.rank(), groups.tp.size()),
            expert_tensor=(groups.expt_tp.rank(), groups.expt_tp.size()),
            layers=tuple(layer.layer_number - 1 for layer in chunk.decoder.layers),
            first_expert=groups.ep.rank() * (model.architecture.num_experts // groups.ep.size()),
        )
        for name, parameter in chunk.named_parameters():
            if name == VALUE_HEAD:
                continue
            experts = [None] if parameter.ndim < 3 else range(len(parameter))
            for expert in experts:
                numbered = name if expert is None else f"{name}{expert}"
                found = LocalTensor(entry_of(numbered, model.architecture, place, shapes), parameter, expert)
                given = tuple(found.of(parameter).shape)
                assert found.entry.shape == given, f"{numbered}: {found.entry.shape} in the table, {given} built"
                yield found


@torch.no_grad()
def load_weights(model: Model, source: TensorSource) -> None:
    """Fills every parameter of this rank, in the parameter's own dtype; call before an optimizer copies them.

    A value head, which no source has, stays as it is.
    Under tied embeddings a source may hold `lm_head.weight` too, as long as it equals the embedding.
    Raises DataError that names up to ten tensors which are missing, unknown to the architecture, of another shape, of
    a dtype not in `DTYPES`, or not finite in the parameter's (in the part that this rank reads).
    """
    check_shapes(model.architecture, source)
    problems: list[str] = []
    for local in local_tensors(model):
        entry, parts = local.entry, []
        for name in entry.hf_names:
            part = entry.cut(source.get(name))
            problems += value_problems(name, part, local.parameter.dtype)
            parts.append(part)
        if not problems:
            local.of(local.parameter).copy_(entry.join(parts))
    if problems:
        raise misfit(source, problems)


@torch.no_grad()
def draw_value_head(model: Model, seed: int) -> None:
    """Fills the value head, on the rank that has one, like `RandomSource`: the same in every layout."""
    for chunk in model.gpt_chunks:
        for name, parameter in chunk.named_parameters():
            if name == VALUE_HEAD:
                deviation = model.architecture.initializer_range
                parameter.copy_(random_tensor(name, tuple(parameter.shape), deviation, seed))


def check_shapes(architecture: Architecture, source: TensorSource) -> None:
    """Raises DataError that names missing, unknown and misshapen tensors of `source`."""
    problems = list(_shape_problems(hf_shapes(architecture), source, architecture.tie_word_embeddings))
    if problems:
        raise misfit(source, problems)


def value_problems(name: str, values: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """What is wrong with a tensor's dtype or values, which are to be kept in `dtype`."""
    if values.dtype not in DTYPES:
        return [f"{name}: dtype {values.dtype}; known are {', '.join(map(str, DTYPES))}"]
    if not values.isfinite().all():
        return [f"{name}: holds values that are not finite"]
    largest = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= largest or values.to(dtype).isfinite().all():
        return []
    return [f"{name}: holds {float(values.abs().max()):.6g}, beyond {dtype}'s largest, {largest:.6g}"]


def misfit(source: object, problems: list[str]) -> DataError:
    return _error(
        source, "these tensors do not fit the model; give a checkpoint that matches its config.json", problems
    )


def _shape_problems(expected: Mapping[str, tuple[int, ...]], source: TensorSource, tied: bool) -> Iterator[str]:
    given = source.shapes()
    single, expected = expected, as_stored(expected, given)
    for name, shape in expected.items():
        if name not in given:
            yield f"{name}: missing"
        elif given[name] != shape:
            yield f"{name}: shape {list(given[name])}, not {list(shape)}"
    for name in given:
        if name in expected:
            continue
        if name in single:
            yield f"{name}: also in {fused_name(name)}, of which there must be one"
        elif not (tied and name == LM_HEAD):
            yield f"{name}: the architecture has no such tensor"
        elif EMBEDDING in given and not torch.equal(source.get(LM_HEAD), source.get(EMBEDDING)):
            yield f"{name}: differs from {EMBEDDING}, but tie_word_embeddings is true"


def _error(where: object, fix: str, problems: list[str]) -> DataError:
    return DataError(problem_list(where, fix, problems))


def problem_list(where: object, fix: str, problems: list[str]) -> str:
    """The message that names up to ten problems, one a line."""
    shown = [f"  {problem}" for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        shown.append(f"  and {len(problems) - MOST_PROBLEMS} more")
    return "\n".join([f"{where}: {fix}", *shown])
