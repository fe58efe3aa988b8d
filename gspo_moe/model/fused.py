"""Experts as transformers 5 may store them (`save_original_format=False`): all of a layer in two tensors.

`mlp.experts.gate_up_proj` [E, 2 I, H] has, for each expert, the gate's rows, then the up projection's;
`mlp.experts.down_proj` [E, H, I] the down projections. Layers stored so and layers stored expert by expert may stand in
one folder; one projection stored both ways may not.

Shape letters: E experts, I expert width, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

_SINGLE = re.compile(r"(?P<experts>model\.layers\.\d+\.mlp\.experts\.)(?P<expert>\d+)\.(?P<name>\w+)\.weight")
_FUSED_OF = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_IN_FUSED = {"gate_proj": (0, 2), "up_proj": (1, 2), "down_proj": (0, 1)}  # which part of how many


def fused_name(name: str) -> str | None:
    """The tensor that holds an expert's projection, such as `model.layers.0.mlp.experts.3.up_proj.weight`, when fused.

    None for any other tensor's name.
    """
    found = _SINGLE.fullmatch(name)
    if found is None or found["name"] not in _FUSED_OF:
        return None
    return found["experts"] + _FUSED_OF[found["name"]]


def fused_part(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[slice, slice]]:
    """Where an expert's projection lies: the fused tensor's name, and what to take of its first two dimensions."""
    found, stored = _SINGLE.fullmatch(name), fused_name(name)
    assert found is not None, f"{name} is no expert's"
    assert stored is not None, f"{name} is no expert's"
    index, count = _IN_FUSED[found["name"]]
    rows, expert = shapes[stored][1] // count, int(found["expert"])
    return stored, (slice(expert, expert + 1), slice(index * rows, (index + 1) * rows))


def as_stored(single: Mapping[str, tuple[int, ...]], stored: Container[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `single` (`names.hf_shapes`), but fused where `stored` has the fused name."""
    found: dict[str, tuple[int, ...]] = {}
    experts: dict[str, set[str]] = {}
    for name, shape in single.items():
        fused = fused_name(name)
        if fused is None or fused not in stored:
            found[name] = shape
            continue
        match = _SINGLE.fullmatch(name)
        assert match is not None
        experts.setdefault(fused, set()).add(match["expert"])
        found[fused] = (len(experts[fused]), shape[0] * _IN_FUSED[match["name"]][1], shape[1])
    return found
