"""Whether a config goes on with the run that a folder holds: which keys make a run what it is. Torch-free.

A run that went on with another objective or model would mix two runs in one file of metrics, under the last one's name.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_moe.config.algorithm import AlgorithmConfig
from gspo_moe.config.checkpoints import newest_checkpoint
from gspo_moe.config.loading import read_yaml, save_config
from gspo_moe.config.migration import migrated
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.files import write_whole
from gspo_moe.manifest import read_manifest
from gspo_moe.plain_json import read_object
from gspo_moe.section import Section

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FINISHED_FILE = "finished"  # of a run without checkpoints, whose last one would else tell
INPUTS_FILE = "inputs.json"
RUN = "run"  # a key there
# A name stands for all below it; every key that none of these holds is part of the run's identity.
# How and where the work is done.
WORK = (
    "parallel",
    "model.backend",
    "model.deterministic",
    "model.fused_log_probs",
    "model.log_prob_memory_mib",
    "rollout.max_batch",
    "rollout.cuda_graph",
    "rollout.servers",
    "schedule.micro_batch_tokens",
    "schedule.exit_after",
    "task.reward.workers",
    "task.reward.timeout_seconds",
    "task.reward.batch_seconds",
    "task.reward.start_seconds",
    "task.reward.memory_mb",
    "task.reward.output_kb",
    "task.reward.allow_all_failed",
    "task.reward.max_failed_batches",
    "task.reward.max_failure_rate",
    "optimizer.max_skipped_updates",
    "checkpoint",
    "guard",
    "logging",
)
# How long the run is and what is measured of it.
EXTENT = (
    "schedule.steps",
    "evaluation",
    "routing.record",
    "routing.engine_routes",
    "routing.audit",
    "routing.probe_interval",
    "routing.probe_sequences",
    "routing.attribution",
    "routing.attribution_interval",
    "routing.attribution_sequences",
    "routing.attribution_by_depth",
    "algorithm.allow_wide_clip",
)
# Paths, of which what lies there counts.
DATA = ("model.hf", "model.checkpoint", "tokenizer.path", "chat.template", "rollout.bank", "algorithm.kl.reference")
# Lists of sections with a path each, whose other keys are the run's identity.
RECORDS = ("task.data.train", "task.data.eval", "task.data.sft")
# The files of a folder that are data; config.json is not: every checkpoint has its own, which a run compares.
READ_BEFORE = ("tokenizer.json", "tokenizer.model", "*.safetensors", "*.distcp")  # by a version without chat templates
READ = (*READ_BEFORE, "chat_template.jinja")
RECORD_FILES = ("**/*.jsonl", "**/*.json", "**/*.parquet", "**/*.arrow")
BLOCKS, BLOCK_BYTES = 16, 1 << 20


def check_continues(config: Config) -> None:
    """Raises ConfigError where `logging.run_dir` has checkpoints of a run that was another one, naming the keys.

    Also where it has a run that kept none: starting anew would write over it.
    """
    newest = newest_checkpoint(config.run_path / "checkpoints")
    if newest is None and _kept_nothing(config.run_path):
        raise ConfigError(
            f"logging.run_dir={config.run_path} holds a run of checkpoint.keep=0, which cannot be gone on with; name "
            "another folder, or remove this one to start anew"
        )
    free: tuple[str, ...] = WORK + EXTENT
    if config.rollout.long_prompts != "error":  # the room that it leaves says which prompts there are
        free = tuple(key for key in free if key != "schedule.micro_batch_tokens")
    changed = [] if newest is None else changes(config.run_path, config, free)
    if changed:
        raise ConfigError(
            f"logging.run_dir={config.run_path} holds another run ({'; '.join(changed)}); restore these to go on with "
            f"it, name another folder, or start from its weights in another folder with model={{checkpoint: {newest}}}"
        )


def _kept_nothing(folder: Path) -> bool:
    metrics = folder / METRICS_FILE
    if not (folder / CONFIG_FILE).is_file() or not metrics.is_file() or not metrics.stat().st_size:
        return False
    written = migrated(read_yaml(folder / CONFIG_FILE)).get("checkpoint")
    return isinstance(written, Mapping) and written.get("keep") == 0


def record_run(config: Config) -> None:
    """Writes what later starts are held against: the config, digests of the data that it names, the run's own name."""
    save_config(config, config.run_path / CONFIG_FILE)
    values = _leaves(config.model_dump(mode="json"))
    run = recorded_run(config.run_path) or _run_of_checkpoint(config.run_path) or uuid.uuid4().hex
    digests = {key: digest(Path(values[key])) for key in DATA if values[key] is not None}
    digests |= {key: digest_of_records(values[key]) for key in RECORDS if values.get(key)}
    write_whole(config.run_path / INPUTS_FILE, json.dumps({RUN: run, **digests}, indent=1) + "\n")


def recorded_run(folder: Path) -> str | None:
    """By which name the run in `folder` marks its checkpoints; None where none was recorded yet."""
    return _read_digests(folder / INPUTS_FILE).get(RUN)


def _run_of_checkpoint(folder: Path) -> str | None:
    """The same, by its newest checkpoint, which was found whole before: of a run whose record is lost."""
    newest = newest_checkpoint(folder / "checkpoints")
    manifest = None if newest is None else read_manifest(newest)
    return None if manifest is None else manifest.about.get("run")


def changes(folder: Path, config: Config, free: Sequence[str]) -> list[str]:
    """`KEY was A and is B` for each key outside `free` in which the run in `folder` was another; none without a run.

    Keys that an older version did not write had their defaults; those that this version does not know are left out.
    """
    written = folder / CONFIG_FILE
    if not written.is_file():
        return []
    defaults = Config(algorithm=AlgorithmConfig(name=config.algorithm.name))
    before = _leaves(defaults.model_dump(mode="json")) | _leaves(migrated(read_yaml(written)))
    now, digests = _leaves(config.model_dump(mode="json")), _read_digests(folder / INPUTS_FILE)
    open_ended = list(_mappings(config))
    gone = [key for key in before if key not in now and covers(open_ended, key)]
    return [
        f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))}{found}"
        for key in (*now, *gone)
        if not covers(free, key)
        and (found := _difference(key, before.get(key), now.get(key), digests.get(key))) is not None
    ]


def covers(names: Sequence[str], key: str) -> bool:
    """Whether `key` is one of the names or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _mappings(section: Section, prefix: str = "") -> Iterator[str]:
    """The keys that take any keys below them, such as task.options."""
    for name, value in section:
        if isinstance(value, Section):
            yield from _mappings(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield prefix + name


def _read_digests(file: Path) -> dict[str, str]:
    """By key of `DATA`; empty where a version that kept none wrote the run."""
    try:
        return read_object(file) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); delete it, and paths are compared instead") from None


def _difference(key: str, before: Any, now: Any, digest_before: str | None) -> str | None:
    """None where the key's values mean the same, else what to say beside the two."""
    if key in RECORDS and before and now and digest_before is not None:
        alike = _without_paths(before) == _without_paths(now)
        if not all(Path(file["path"]).exists() for file in now):  # said by what reads files
            return None if before == now else ""
        same = alike and digest_of_records(now) == digest_before
        return None if same else " with other content" if before == now else ""
    if key not in DATA or before is None or now is None:
        return None if before == now else ""
    path = Path(now)
    if digest_before is None:  # written by a version that kept none
        return None if before == now or (Path(before).exists() and digest(Path(before)) == digest(path)) else ""
    if not path.exists():  # said by what checks files
        return None if before == now else ""
    same = digest_before in (digest(path), digest(path, READ_BEFORE))
    return None if same else " with other content"


def digest_of_records(files: Sequence[Mapping[str, Any]]) -> str:
    """Of what lies at the paths of a list of `task.data`, in order; names count, as prompts are called by them."""
    paths = [Path(file["path"]) for file in files]
    found = [f"{path.name if path.is_file() else ''} {digest(path, RECORD_FILES)}" for path in paths if path.exists()]
    return hashlib.blake2b("\n".join(found).encode(), digest_size=16).hexdigest()


def _without_paths(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in file.items() if name != "path"} for file in files]


def digest(path: Path, patterns: Sequence[str] = READ) -> str:
    """Of a file, or of a folder's weights and tokenizer: names, sizes and `BLOCKS` evenly spaced blocks of each.

    patterns: of a folder's files that count. A file of up to 16 MiB is read whole; of a larger one, 16 MiB.
    """
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        found.update(f"{'' if file == path else file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in _starts(size):
                opened.seek(start)
                found.update(opened.read(BLOCK_BYTES))
    return found.hexdigest()


def _starts(size: int) -> Sequence[int]:
    """Where the blocks to read begin in a file of that many bytes."""
    if size <= BLOCKS * BLOCK_BYTES:
        return range(0, size, BLOCK_BYTES)
    return [(size - BLOCK_BYTES) * number // (BLOCKS - 1) for number in range(BLOCKS)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
