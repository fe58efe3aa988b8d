"""The command `gspo-moe`. Heavy imports wait until a command is chosen."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gspo_moe.config.loading import load_config
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError, GspoMoeError

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 2, with one message and no stack trace, for what the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        _under_launcher(options.run)(options)
    except ConfigError as error:
        _complain(error)
        return USER_ERROR
    except GspoMoeError as error:
        # On several ranks the error has to reach the launcher, which shows the first rank's that failed.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        _complain(error)
        return USER_ERROR
    return 0


def _under_launcher(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Under torchrun, lets a failing rank's error reach the launcher's last words."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return run
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(run)


def _complain(error: Exception) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"gspo-moe: {type(error).__name__}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gspo-moe", description="Reinforcement learning of Qwen3 MoE models with GSPO on megatron-core."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", _train, "run or continue the run that a config describes"),
        ("eval", _eval, "held-out accuracy of the config's model"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="YAML file; see examples/")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.set_defaults(run=run)
    command = commands.add_parser("score", help="token log-probs of given sequences under a model")
    command.add_argument("--model", required=True, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    command.add_argument("--data", required=True, metavar="IN.jsonl", help='lines {"token_ids": [...]}')
    command.add_argument("--output", required=True, metavar="OUT.jsonl", help='lines {"log_probs": [...]}, in order')
    command.add_argument("--routes", action="store_true", help="add the experts that each scoring position picked")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. parallel.tensor=2")
    command.set_defaults(run=_score)
    command = commands.add_parser("doctor", help="what was found on this machine and what each absence means")
    command.set_defaults(run=_doctor)
    return parser


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from gspo_moe.training.loop import train
    from gspo_moe.training.plan import make_plan

    train(make_plan(config))
    if int(os.environ.get("RANK", "0")) == 0:
        _show_run(config)


def _show_run(config: Config) -> None:
    from rich.console import Console

    from gspo_moe.observability import load_run
    from gspo_moe.observability.summary import summary_table
    from gspo_moe.report.curves import draw_curves

    run = load_run(config.run_path)
    first = {name: float(run.values(name)[0]) for name in run.names}
    last = {name: float(run.values(name)[-1]) for name in run.names}
    Console(width=100).print(summary_table(first, last, last))
    picture = draw_curves(config.run_path)
    print(f"{config.run_path}: config.yaml, metrics.jsonl, tensorboard/, samples.jsonl, checkpoints/, {picture.name}")


def _eval(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from gspo_moe.evaluation.evaluate import evaluate, evaluation_metrics
    from gspo_moe.training.plan import make_plan
    from gspo_moe.training.session import open_session

    plan = make_plan(config)
    session = open_session(plan)
    answers = evaluate(config, session.answerer, plan.task, session.stop_ids, policy_version=0)
    session.close()
    if session.groups.is_main:
        for name, value in evaluation_metrics(answers).items():
            print(f"{name} {value:.6g}")


def _score(options: argparse.Namespace) -> None:
    config = load_config(None, ["model.preset=null", f"model.hf={options.model}", *options.overrides])
    from gspo_moe.rollout.score_file import score_file

    score_file(config, Path(options.data), Path(options.output), with_routes=options.routes)


def _doctor(options: argparse.Namespace) -> None:
    from gspo_moe.platform.doctor import report

    print(report())
