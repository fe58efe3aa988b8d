"""What each run was: model, task, date, versions, layout, as its config and starts.jsonl tell; and its whole config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml

from gspo_moe.observability.summary import short_count
from gspo_moe.report.collect import Arm, Cell

UNKNOWN = "not recorded"
UNREADABLE = "not readable in config.yaml or starts.jsonl"
# Sizes of `layout` that say nothing where they are 1, in the order in which they are named.
AXES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
# What makes a run another seed of the same, and where it lies.
APART = ("seed", "logging.run_dir")


@dataclass(frozen=True)
class Fact:
    """One line of what runs were.

    values: one an arm; an arm whose seeds differ lists all of theirs. shared: all alike.
    """

    name: str
    values: tuple[str, ...]

    @property
    def shared(self) -> bool:
        return len(set(self.values)) == 1


def facts(arms: Sequence[Arm]) -> tuple[Fact, ...]:
    """Of every arm: model, task, objective, batch, dates, device, layout, versions."""
    of_cells = [[_told(cell) for cell in arm.cells] for arm in arms]
    names = list(of_cells[0][0])
    rows = [Fact(name, tuple(_joined([cell[name] for cell in cells]) for cells in of_cells)) for name in names]
    return (*rows, Fact("run", tuple(run_dates(arm.cells) for arm in arms)))


def _told(cell: Cell) -> dict[str, str]:
    """Every fact; one that a damaged config has no such form for says so."""
    config, start = cell.run.config, cell.run.starts[-1] if cell.run.starts else {}
    facts = {
        "model": lambda: _model(config, start),
        "task": lambda: _task(_section(config, "task")),
        "objective": lambda: _objective(config),
        "batch": lambda: _batch(config),
        "layout": lambda: _layout(config, start),
        "device": lambda: str(start.get("device", UNKNOWN)),
        "versions": lambda: (
            ", ".join(f"{name} {value}" for name, value in _section(start, "versions").items()) or UNKNOWN
        ),
    }
    found = {}
    for name, fact in facts.items():
        try:
            found[name] = fact()
        except (TypeError, ValueError, AttributeError, OverflowError):
            found[name] = UNREADABLE
    return found


def _model(config: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    model = _section(config, "model")
    source = next((str(model[key]) for key in ("hf", "checkpoint", "preset") if model.get(key)), UNKNOWN)
    sizes = _section(start, "architecture") or _section(model, "overrides")
    words = [source, *([str(model["dtype"])] if model.get("dtype") else [])]
    if start.get("parameters"):
        words.append(
            f"{short_count(start['parameters'])} parameters, {short_count(start.get('active_parameters', 0))} active"
        )
    named = {"num_hidden_layers": "layers", "num_experts": "experts", "hidden_size": "hidden"}
    words += [f"{sizes[key]} {word}" for key, word in named.items() if key in sizes]
    if "num_experts_per_tok" in sizes:
        words.append(f"top-{sizes['num_experts_per_tok']}")
    return ", ".join(words)


def _task(task: Mapping[str, Any]) -> str:
    """Its name, its files, and what rewards and answers it where the config names that."""
    words = [str(task.get("name", UNKNOWN))]
    for split in ("train", "eval", "sft"):
        paths = [str(_section(entry, "path", entry)) for entry in _section(task, "data").get(split) or ()]
        words += [f"{split}: {' + '.join(paths)}"] if paths else []
    reward = _section(task, "reward")
    terms = [f"{term.get('weight', 1.0):g} {term.get('name')}" for term in reward.get("sum") or ()]
    given = reward.get("name") or " + ".join(terms)
    words += [f"reward: {given}"] if given else []
    environment = _section(task, "environment").get("name")
    return ", ".join([*words, *([f"environment: {environment}"] if environment else [])])


def _objective(config: Mapping[str, Any]) -> str:
    if config.get("stage") == "sft":
        return "supervised"
    algorithm, replay = _section(config, "algorithm"), _section(config, "routing").get("replay")
    words = [str(algorithm.get("name", UNKNOWN))]
    return ", ".join([*words, *([f"replay {replay}"] if replay not in (None, "none", "off") else [])])


def _batch(config: Mapping[str, Any]) -> str:
    rollout, schedule = _section(config, "rollout"), _section(config, "schedule")
    words = []
    if config.get("stage") != "sft" and "prompts_per_step" in rollout:
        words.append(f"{rollout['prompts_per_step']} prompts x {rollout.get('samples_per_prompt')} answers")
        words.append(f"{_section(config, 'algorithm').get('mini_batches')} mini-batches a step")
    words += [f"{schedule['steps']} step{'' if schedule['steps'] == 1 else 's'}"] if "steps" in schedule else []
    rate = _section(config, "optimizer").get("lr")
    return ", ".join([*words, *([f"learning rate {rate:g}"] if isinstance(rate, int | float) else [])]) or UNKNOWN


def _layout(config: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Every parallel size above 1; of a run without starts.jsonl, those that its config names."""
    sizes = _section(start, "layout") or _section(config, "parallel")
    axes = [*AXES, "data"] if start else AXES
    named = [f"{axis.replace('_', ' ')} {sizes[axis]}" for axis in axes if sizes.get(axis) not in (None, 1)]
    world = start.get("world_size")
    processes = "processes not recorded" if world is None else f"{world} process{'' if world == 1 else 'es'}"
    return ", ".join([processes, *named])


def run_dates(cells: Sequence[Cell]) -> str:
    """From when to when the arm's runs wrote metrics, and how often they were started where one was more than once."""
    times = [time for cell in cells for time in cell.run.times or ()]
    if not times:
        return UNKNOWN
    first, last = (datetime.fromtimestamp(time).astimezone() for time in (min(times), max(times)))
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    starts = max(len(cell.run.starts) for cell in cells)
    return f"{first:%Y-%m-%d %H:%M} to {end} {last:%Z}" + (f", {starts} starts" if starts > 1 else "")


def config_text(arms: Sequence[Arm]) -> str:
    """The config that the runs share, as YAML; a key in which they differ tells so. Empty without a config.yaml."""
    configs = [cell.run.config for arm in arms for cell in arm.cells if cell.run.config]
    if not configs:
        return ""
    return yaml.safe_dump(_common(configs), sort_keys=False, allow_unicode=True)


def _common(configs: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) for config in configs]
        sections = [value for value in values if isinstance(value, dict)]
        if len(sections) == len(values):
            found[key] = _common(sections, f"{prefix}{key}.")
        elif all(value == values[0] for value in values):
            found[key] = values[0]
        else:
            found[key] = "(each run's own)" if f"{prefix}{key}" in APART else "(differs, see Config differences)"
    return found


def _joined(values: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(values))


def _section(values: Any, name: str, otherwise: Any = None) -> Any:
    """`values[name]`, a mapping unless `otherwise` is given; of older and foreign configs nothing is certain."""
    found = values.get(name) if isinstance(values, Mapping) else None
    if otherwise is not None:
        return otherwise if found is None else found
    return found if isinstance(found, Mapping) else {}
