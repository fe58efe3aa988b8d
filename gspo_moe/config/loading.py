"""YAML and dotted overrides in, `Config` out, and back. Torch-free.

YAML is read by the 1.2 rules for plain scalars: only true and false are booleans (so `on` and `no` stay text), `1e-4`
is a number, and there are no dates, sexagesimals or octals by a leading zero. A key that stands twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from gspo_moe.config.migration import migrated
from gspo_moe.config.schema import Config
from gspo_moe.config.validation import shortened, validated
from gspo_moe.errors import ConfigError
from gspo_moe.files import write_whole
from gspo_moe.plain_json import DEEPEST, check_characters

FLOAT = re.compile(
    r"^[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
)
FLOAT_START = list("-+.0123456789")
SCALARS_1_2 = (
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", FLOAT, FLOAT_START),
    ("merge", re.compile(r"^<<$"), ["<"]),
)
MOST_VALUES = 100_000
LONGEST_OVERRIDE = 200  # in messages

# Sections that a name alone may stand for, and the key that it is.
NAMED_ALONE = {"model": "preset", "task.reward": "name", "task.environment": "name"}


class _Loader(yaml.SafeLoader):
    """Refuses what no config says: deep nesting, a node within itself, aliases that multiply, half of a character."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._around: list[yaml.Node] = []  # the nodes that the present one is within
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        around = self._around if parent is None else [*self._around, parent]
        if len(around) > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} deep", mark)
        self._around, outside = around, self._around
        node = super().compose_node(parent, index)
        self._around = outside
        if node in around:
            raise yaml.composer.ComposerError(None, None, "a value stands within itself", mark)
        if node is not None and self._size(node) > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"aliases make more than {MOST_VALUES} values of it", mark)
        return node

    def _size(self, node: yaml.Node) -> int:
        """Values in it, those of an alias each time; of the nodes within it they are known."""
        if node not in self._sizes:
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            each = [one for pair in inner for one in (pair if isinstance(pair, tuple) else (pair,))]
            self._sizes[node] = 1 + sum(map(self._size, each))
        return self._sizes[node]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if isinstance(node, yaml.ScalarNode):
                check_characters(node.value)
                if "\0" in node.value:
                    raise ValueError("a null character")
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:  # of a tag, or of a number of 5,000 digits
            raise yaml.constructor.ConstructorError(
                None, None, f"{shortened(node.value)} cannot be read as {node.tag} ({error})", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice; remove one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _start in SCALARS_1_2:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _start)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, FLOAT_START)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config in the file `path` (None: all defaults) with `section.key=value` overrides, values in YAML.

    `model=NAME` stands for `model.preset=NAME`; a section given whole (`parallel={tensor: 2}`) replaces the file's.
    Raises ConfigError, one line for each thing that is wrong, and for an empty file.
    """
    values = read_values(path)
    if path is not None and not values:
        raise ConfigError(
            f"the config {path} is empty; name a model and a task in it, as examples/quickstart.yaml does"
        )
    for override in overrides:
        _apply(values, override)
    return validated(Config, migrated(values))


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values in a YAML file (None: nothing) with overrides in them, unchecked; raises ConfigError."""
    values = {} if path is None else read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return values


def as_override(key: str, value: Any) -> str:
    """`key=value` as `load_config` reads it back, whatever plain value it is."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"


def save_config(config: Config, path: str | Path) -> None:
    """Writes every key, defaults too, so that `load_config(path)` gives an equal config; replaces the file at once."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_whole(Path(path), text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked; raises ConfigError for a missing file and for broken YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8") from None
    values = _parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__} {shortened(values)}; expected sections, such as `model: tiny`"
        )
    return values


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}; mend the YAML there") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}; mend the YAML") from None


def _cut(override: str) -> str:
    text = repr(override)
    return text if len(text) <= LONGEST_OVERRIDE else text[:LONGEST_OVERRIDE] + "..."


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, name = dotted.strip().split(".")
    if not equals or not all((*sections, name)):
        raise ConfigError(f"override {_cut(override)} is not of the form section.key=value; write for example seed=2")
    if len(sections) > DEEPEST:
        raise ConfigError(f"override {_cut(override)} has {len(sections)} sections; no key lies as deep")
    here = values
    for depth, section in enumerate(sections):
        inner = here.get(section)
        alone = NAMED_ALONE.get(".".join(sections[: depth + 1]))
        if alone is not None and isinstance(inner, str):
            inner = {alone: inner}
        elif inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {_cut(override)}: {'.'.join(sections[: depth + 1])}={shortened(inner)} is a value, not a "
                "section; override the value itself"
            )
        here[section] = dict(inner)
        here = here[section]
    here[name] = _parse(text, f"override {_cut(override)}")
