"""The command `gspo-moe`. Heavy imports wait until a command is chosen."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gspo_moe import __version__, garbage
from gspo_moe.errors import ConfigError, GspoMoeError, OutputError, RunError
from gspo_moe.evaluation.command import add_generate
from gspo_moe.files import reader_is_gone
from gspo_moe.last_words import (
    LAUNCHER_ERROR_FILE,
    complain,
    of_the_system,
    under_launcher,
    wait_for_another_ranks_cause,
)
from gspo_moe.orphans import end_with_launcher
from gspo_moe.packages import as_user_error, require
from gspo_moe.replay.command import add_replay
from gspo_moe.report.command import add_report
from gspo_moe.scoring.parity_command import add_parity
from gspo_moe.watching.command import add_compare

if TYPE_CHECKING:
    from gspo_moe.config.schema import Config
    from gspo_moe.parallel.signals import StopSignals

USER_ERROR = GspoMoeError.exit_code
# Logged at every start: a toolkit without a GPU, and megatron-core 0.19's plans for parts that it has no other way for
# and for common.pt, which all versions read.
LIBRARY_LOGS = (
    "torch.utils.cpp_extension",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
)
# megatron-core warns of missing packages at every start, where `gspo-moe doctor` says more; torch of its own old names.
LIBRARY_NOISE = (
    (r"megatron\.core", Warning),
    (r"torch\.distributed", FutureWarning),
    (r"torch\.distributed\.checkpoint", UserWarning),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: the error's own, with one message and no stack trace, for ours."""
    end_with_launcher()
    options = _options(arguments)
    for module, category in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", module=module, category=category)
    for name in LIBRARY_LOGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        error = under_launcher(_attempt)(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130  # a shell's for SIGINT
    except BrokenPipeError:
        if not reader_is_gone(sys.stdout):
            raise
        return 141  # a shell's for SIGPIPE
    if error is None:
        return 0
    complain(error)
    return error.exit_code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and behind options, which argparse takes for one of both places only."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(each.startswith("-") for each in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _attempt(options: argparse.Namespace) -> GspoMoeError | None:
    try:
        options.run(options)
    except GspoMoeError as error:
        return error
    except ModuleNotFoundError as error:
        missing = as_user_error(error)
        if missing is None:
            raise
        return missing
    except Exception as error:
        known = of_the_system(error)
        if known is not None:
            return known
        wait_for_another_ranks_cause(error)
        raise
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gspo-moe", description="Reinforcement learning of Qwen3 MoE models with GSPO on megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"gspo_moe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="run or continue the run that a config describes")
    command.add_argument("config", help="YAML file; see examples/")
    command.add_argument("--check", action="store_true", help="say what the run needs and start nothing")
    command.add_argument("--world-size", type=int, metavar="N", help="processes that --check plans for")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_train)
    command = commands.add_parser("eval", help="held-out accuracy, avg@k and pass@k of the config's model")
    command.add_argument("config", help="YAML file; see examples/")
    command.add_argument("--data", metavar="FILE", help="held-out prompts, in place of the config's")
    command.add_argument("--output", type=Path, metavar="ANSWERS.jsonl", help="prompts, answers and rewards")
    command.add_argument("--overwrite", action="store_true", help="replace an --output that is there")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. evaluation.samples=32")
    command.set_defaults(run=_eval)
    add_generate(commands)
    command = commands.add_parser("score", help="token log-probs of given sequences under a model")
    command.add_argument("--model", required=True, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    command.add_argument("--data", required=True, metavar="IN.jsonl", help="lines of token_ids, text or messages")
    command.add_argument("--output", required=True, metavar="OUT.jsonl", help='lines {"log_probs": [...]}, in order')
    command.add_argument("--routes", action="store_true", help="add the experts that each scoring position picked")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. parallel.tensor=2")
    command.set_defaults(run=_score)
    command = commands.add_parser(
        "convert", help="weights of a Hugging Face folder into a distributed checkpoint for any layout, or back"
    )
    command.add_argument("--from", dest="source", required=True, metavar="SRC", help="a folder of either kind")
    command.add_argument("--to", dest="target", required=True, metavar="DST", help="a folder that does not exist yet")
    command.add_argument("--config", metavar="CONFIG.yaml", help="model.dtype, tokenizer and logging.progress count")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.dtype=bf16")
    command.set_defaults(run=_convert)
    command = commands.add_parser("bank", help="freeze rollouts and rewards of a policy, for runs with rollout.bank")
    command.add_argument("config", metavar="CONFIG.yaml", help="schedule.steps * rollout.prompts_per_step prompts")
    command.add_argument("bank", metavar="BANK.safetensors", help="the file to write; one that exists is refused")
    command.add_argument("--overwrite", action="store_true", help="replace it, though runs may rest on its rollouts")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. routing.engine_routes=true")
    command.set_defaults(run=_bank)
    add_replay(commands)
    command = commands.add_parser("study", help="arms x seeds from one cold start, compared in pairs")
    command.add_argument("study", metavar="STUDY.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. 'seeds=[1, 2]' set.schedule.steps=20")
    command.set_defaults(run=_study)
    add_report(commands)
    add_compare(commands)
    add_parity(commands)
    command = commands.add_parser("doctor", help="what was found on this machine; of a config, what its policy reads")
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="shows its first prompt, template, reward")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_doctor)
    return parser


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    with garbage.imports():  # which go on while the config is read: an algorithm brings torch
        from gspo_moe.config import loading

        return loading.load_config(path, overrides)


def _train(options: argparse.Namespace) -> None:
    from gspo_moe.parallel.signals import StopSignals  # here, as `compare` and `watch` go without the trainer's rooms

    require("matplotlib")  # of the picture at the end
    if options.check or options.world_size is not None:
        _check(load_config(options.config, options.overrides), options)
        return
    with StopSignals() as stop:  # from the first moment, so that a signal ends all ranks of a run alike
        _train_until(stop, options)


def _train_until(stop: StopSignals, options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    stop.end_after(config.schedule.exit_after)
    with garbage.imports():
        from gspo_moe.parallel.groups import shut_down
        from gspo_moe.training.loop import train
        from gspo_moe.training.preflight import preflight, take_run_folder

    take_run_folder(config, ends_together=LAUNCHER_ERROR_FILE in os.environ)
    try:
        trained = train(preflight(config), stop)
    except (RunError, OutputError):
        shut_down()
        raise
    shut_down()
    if int(os.environ.get("RANK", "0")) == 0:
        if not trained:
            print(
                f"{config.run_path} has finished its {config.schedule.steps} steps before: nothing was trained. "
                "Start anew with another logging.run_dir, or go on with a higher schedule.steps."
            )
        from gspo_moe.report.finished import show_run

        show_run(config)


def _check(config: Config, options: argparse.Namespace) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if options.world_size is None else options.world_size
    if not options.check:
        raise ConfigError("--world-size is what --check plans for; add --check, or start as many processes")
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: give a whole number from 1 up")
    from gspo_moe.observability.progress import show_header
    from gspo_moe.training.check import check_run

    show_header(check_run(config, world_size), sys.stdout)


def _eval(options: argparse.Namespace) -> None:
    with garbage.imports():
        from gspo_moe.training.evaluation import evaluate_alone, evaluation_config

    config = evaluation_config(options.config, options.overrides, options.data)
    for line in evaluate_alone(config, options.output, overwrite=options.overwrite):
        print(line)


def _score(options: argparse.Namespace) -> None:
    config = load_config(None, ["model.preset=null", f"model.hf={options.model}", *options.overrides])
    with garbage.imports():
        from gspo_moe.parallel.groups import shut_down
        from gspo_moe.scoring.file import score_file

    score_file(config, Path(options.data), Path(options.output), with_routes=options.routes)
    shut_down()


def _convert(options: argparse.Namespace) -> None:
    found = "checkpoint" if (Path(options.source) / "metadata.json").is_file() else "hf"
    source = {"preset": "null", "hf": "null", "checkpoint": "null", "overrides": "{}", found: options.source}
    model = [f"model.{key}={value}" for key, value in source.items()]
    config = load_config(options.config, [*model, *options.overrides])
    from gspo_moe.model.convert import convert
    from gspo_moe.parallel.groups import shut_down

    count = convert(config, Path(options.target))
    shut_down()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{options.target}: {count} tensors equal those of {options.source}")


def _bank(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    with garbage.imports():
        from gspo_moe.parallel.groups import shut_down
        from gspo_moe.training.bank import make_bank
        from gspo_moe.training.preflight import preflight

    if config.stage != "rl":
        raise ConfigError(f"stage={config.stage} makes no rollouts to freeze; set stage=rl")
    count = make_bank(preflight(config), Path(options.bank), overwrite=options.overwrite)
    shut_down()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{options.bank}: answers to {count} prompts")


def _study(options: argparse.Namespace) -> None:
    from gspo_moe.study import run_study

    print(run_study(options.study, options.overrides))


def _doctor(options: argparse.Namespace) -> None:
    if options.config is not None:
        config = load_config(options.config, options.overrides)
        from gspo_moe.training.shown import describe

        print(describe(config))
        return
    from gspo_moe.kernels import kernels
    from gspo_moe.platform.doctor import report

    print(report(kernels().summary))
