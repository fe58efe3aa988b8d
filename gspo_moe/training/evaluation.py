"""`gspo-moe eval`: one evaluation of a config's model, outside of any run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo_moe.config.data import DataConfig, DataFile
from gspo_moe.config.loading import load_config, read_values
from gspo_moe.config.schema import Config
from gspo_moe.config.task import FROM_FILES
from gspo_moe.errors import ConfigError
from gspo_moe.evaluation.answers import check_answers_file, write_answers
from gspo_moe.evaluation.estimates import summary
from gspo_moe.evaluation.evaluate import evaluation_metrics
from gspo_moe.parallel.groups import shut_down
from gspo_moe.training.preflight import preflight
from gspo_moe.training.session import open_session

READING = ("format", "columns", "reward")  # what a file of the config says of how records are read and rewarded


def evaluate_alone(config: Config, output: Path | None, *, overwrite: bool = False) -> list[str]:
    """The lines to print, none off the main process; the answers go to `output`. Collective.

    Raises ConfigError before any process group starts for what cannot work, `output` included; RewardError where every
    reward failed.
    """
    if not config.evaluation.prompts:
        raise ConfigError("evaluation.prompts=0 leaves nothing to evaluate; set it to 512, for example")
    if output is not None:
        check_answers_file(output, overwrite=overwrite)
    session = open_session(preflight(config, trains=False))
    try:
        session.publish(0)
        groups = session.evaluate("of the model as it is")
    finally:
        session.close()
    shut_down()
    if not session.groups.is_main:
        return []
    if output is not None:
        write_answers(output, groups)
    ks = config.evaluation.pass_at
    return list(summary(groups, evaluation_metrics(groups, ks), ks))


def evaluation_config(path: str, overrides: Sequence[str], data: str | None) -> Config:
    """The config in `path`, held-out prompts from the file `data` if that is given: then all of them by default.

    The file is read as the config's first file of `task.data.eval`, else of `task.data.train`: with its format, columns
    and reward; files to train on are left out. Another task becomes one of files, its options left out.
    """
    config = load_config(path, overrides)
    if data is None:
        return config
    before = config.task.data or DataConfig(eval=(DataFile(path=data),))
    read = {key: getattr(like, key) for like in (*before.eval, *before.train)[:1] for key in READING}
    file = DataFile(path=data, **read)
    kept = {key: getattr(before, key) for key in ("columns", "system", "template", "on_bad_record")}
    task = config.task.model_copy(
        update={"name": FROM_FILES, "options": {}, "data": DataConfig(eval=(file,), shuffle=False, **kept)}
    )
    changed: dict[str, Any] = {"task": task}
    given = read_values(None, overrides).get("evaluation")
    if not (isinstance(given, dict) and "prompts" in given):
        changed["evaluation"] = config.evaluation.model_copy(update={"prompts": "all"})
    return config.model_copy(update=changed)
