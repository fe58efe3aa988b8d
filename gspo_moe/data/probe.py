"""The probe set of the update pair: sequences fixed at the run's first probe, kept beside its metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gspo_moe.errors import DataError
from gspo_moe.files import write_whole
from gspo_moe.plain_json import parse_json
from gspo_moe.types import TrainingSample

FILE = "probe.jsonl"


def probe_set(
    run_path: Path, samples: Sequence[TrainingSample], group_size: int, count: int, resumed: bool, main: bool
) -> list[TrainingSample]:
    """`count` sequences: those of the run's file when it was resumed, else of `samples`, one a prompt before two.

    samples: the step's, group by group. main: this process writes the file. Raises DataError for a damaged file.
    """
    path = run_path / FILE
    if resumed and path.is_file():
        return _read(path)
    order = sorted(range(len(samples)), key=lambda index: (index % group_size, index))
    chosen = [TrainingSample(samples[i].token_ids, samples[i].response_mask) for i in order[:count]]
    if main:
        lines = [{"token_ids": sample.token_ids, "response_mask": sample.response_mask} for sample in chosen]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return chosen


def _read(path: Path) -> list[TrainingSample]:
    try:
        with path.open(encoding="utf-8", newline="\n") as opened:
            lines = [parse_json(line) for line in opened]
        return [TrainingSample(tuple(line["token_ids"]), tuple(line["response_mask"])) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and the probe set is drawn anew") from error
