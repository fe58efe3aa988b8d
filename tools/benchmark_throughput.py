"""Speed of whole RL steps: tokens/s, TFLOP/s, MFU, time by phase with its spread over ranks, peak memory.

    python tools/benchmark_throughput.py CONFIG.yaml [section.key=value ...] [--json FILE] [--profile FILE]
    bash launch/torchrun.sh --nproc-per-node 8 -- tools/benchmark_throughput.py CONFIG.yaml ...

The steps are those of `gspo-moe train`, from the weights in model.hf or random ones; nothing is logged or saved.
TFLOP/s are the operations that the model needs (`gspo_moe/planning/flops.py`) over the time of the slowest rank.
With --synthetic N prompts are N random words, rewards random numbers, and only the length limit ends an answer
(`tools/synthetic.py`): the config's sizes alone decide how much is done. --profile adds a step, with answers of at most
16 tokens, under torch's profiler, and counts its kernel launches and the host's waits for the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder

from gspo_moe.cli import LIBRARY_NOISE, USER_ERROR
from gspo_moe.config import Architecture, Config, load_config
from gspo_moe.errors import ConfigError, GspoMoeError
from gspo_moe.planning.flops import TRAINING_PASSES, Work, forward_flops, generation, whole_sequences
from gspo_moe.platform import device, megatron_version, peak_rss_gib
from gspo_moe.rollout.answers import all_rollouts
from gspo_moe.types import RolloutGroup
from tools.peak_tflops import known_peak_tflops
from tools.synthetic import open_synthetic_session
from tools.watching import CpuTimers, count_messages, profile_step, time_calls

if TYPE_CHECKING:
    from gspo_moe.training.rl import StepResult
    from gspo_moe.training.session import Plan

PHASES = ("rollout", "reward", "old_log_probs", "training")


def main() -> int:
    options = _options()
    for module, category in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", module=module, category=category)
    try:
        with tempfile.TemporaryDirectory() as run_dir:
            config = load_config(options.config, [*options.overrides, f"logging.run_dir={run_dir}"])
            if config.stage != "rl":
                raise ConfigError(f"stage={config.stage}: only RL steps are measured; set stage=rl")
            found = measure(config, options)
    except GspoMoeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"benchmark_throughput: {type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    if found is not None:
        show(found)
        write(options.json, found)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file of an RL run; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=3, help="steps to measure (3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (1)")
    parser.add_argument(
        "--peak-tflops", type=float, help="peak of one device, for MFU; known for A100, H100, H200, B200"
    )
    parser.add_argument("--synthetic", type=int, metavar="N", help="prompts of N random words, random rewards")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a further step's operations there")
    parser.add_argument("--messages", action="store_true", help="take a further step and count its communication")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_intermixed_args()
    if options.steps < 1 or options.warmup < 0 or (options.peak_tflops is not None and options.peak_tflops <= 0):
        parser.error("--steps must be at least 1, --warmup at least 0 and --peak-tflops above 0")
    if options.synthetic is not None and options.synthetic < 1:
        parser.error("--synthetic must be at least 1")
    return options


@dataclass(frozen=True)
class RankFigures:
    """seconds: a step's mean, by phase; `rest` is what no phase covers. Peak memory in GiB; device_gib is 0 on CPU.

    update_seconds: of the optimizer, part of the training phase. cpu_seconds: of all threads, with `update` as a phase.
    """

    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    update_seconds: float
    host_gib: float
    device_gib: float


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any] | None:
    """Takes the steps; their report, on the first rank. Collective."""
    from gspo_moe.parallel.groups import shut_down
    from gspo_moe.training.preflight import preflight
    from gspo_moe.training.resuming import open_trainer
    from gspo_moe.training.rl import rl_step
    from gspo_moe.training.session import open_session

    plan, steps = preflight(config), options.steps
    session = open_session(plan) if options.synthetic is None else open_synthetic_session(plan, options.synthetic)
    session.timers = timers = CpuTimers()
    trainer = open_trainer(session)
    cpu_updates = time_calls(trainer.optimizer, "update", device().synchronize, time.process_time)
    updates = time_calls(trainer.optimizer, "update", device().synchronize)
    for _ in range(options.warmup):
        rl_step(trainer)
    for found_so_far in (updates, cpu_updates, timers.cpu_seconds):
        found_so_far.clear()
    timers.take()
    results = [rl_step(trainer) for _ in range(steps)]
    taken = timers.take()
    seconds = by_phase({phase: taken[f"timing/{phase}_seconds"] / steps for phase in ("step", *PHASES)})
    cpu_seconds = by_phase({phase: timers.cpu_seconds[phase] / steps for phase in ("step", *PHASES)})
    cpu_seconds["update"] = sum(cpu_updates) / steps
    mine = RankFigures(seconds, cpu_seconds, sum(updates) / steps, peak_rss_gib(), device().peak_memory_gib())
    ranks: list[Any] = [None] * session.groups.world_size
    dist.all_gather_object(ranks, mine)
    found = report(plan, results, ranks, options.peak_tflops) if session.groups.is_main else None
    if options.messages:
        counted = count_messages(partial(rl_step, trainer))
        if found is not None:
            found["communication"] = dataclasses.asdict(counted)
    if options.profile is not None:
        write(options.json, found)  # lest a profiler that fails takes these figures along
        profile, table = profile_step(session, partial(rl_step, trainer))
        if found is not None:
            found["profile"] = dataclasses.asdict(profile)
            options.profile.write_text(table)
    session.close()
    shut_down()
    return found


def by_phase(seconds: dict[str, float]) -> dict[str, float]:
    return {**seconds, "rest": seconds["step"] - sum(seconds[phase] for phase in PHASES)}


def write(file: Path | None, found: dict[str, Any] | None) -> None:
    if file is not None and found is not None:
        file.write_text(json.dumps(found, indent=2) + "\n")


def report(
    plan: Plan, results: Sequence[StepResult], ranks: Sequence[RankFigures], peak_tflops: float | None
) -> dict[str, Any]:
    """What --json writes. Tokens, TFLOP and seconds are a step's; peak_tflops and mfu are None where unknown."""
    config, architecture, on_gpu = plan.config, plan.architecture, device().kind == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads a process"
    groups = [group for result in results for group in result.batch.groups]
    needed = needed_flops(architecture, groups, [group for result in results for group in scored(config, result)])
    tflop = {phase: {k: v / len(results) / 1e12 for k, v in parts.items()} for phase, parts in needed.items()}
    seconds = {phase: spread([rank.seconds[phase] for rank in ranks]) for phase in ranks[0].seconds}
    totals = {phase: sum(parts.values()) for phase, parts in tflop.items()}
    totals["step"] = sum(totals.values())
    speed = {phase: total / seconds[phase]["max"] / len(ranks) for phase, total in totals.items()}
    without_update = max(rank.seconds["training"] - rank.update_seconds for rank in ranks)
    trained, generated = (
        sum(result.metrics[key] for result in results) / len(results) for key in ("throughput/tokens", "rollout/tokens")
    )
    memory = {"host": spread([rank.host_gib for rank in ranks])}
    if on_gpu:
        memory["device"] = spread([rank.device_gib for rank in ranks])
        peak_tflops = peak_tflops or known_peak_tflops(name)
    return {
        "benchmark": "throughput",
        "device": name,
        "processes": len(ranks),
        "parallel": config.parallel.model_dump(mode="json"),
        "dtype": config.model.dtype,
        "torch": torch.__version__,
        "megatron_core": megatron_version(),
        "parameters": architecture.num_parameters,
        "active_parameters": architecture.num_active_parameters,
        "steps": len(results),
        "tokens": trained,
        "tokens_per_second": trained / seconds["step"]["max"],
        "rollout_tokens": generated,
        "rollout_tokens_per_second": generated / seconds["rollout"]["max"],
        "seconds": seconds,
        "cpu_seconds": {phase: sum(rank.cpu_seconds[phase] for rank in ranks) for phase in ranks[0].cpu_seconds},
        "tflop": tflop,
        "tflops_per_process": speed,
        "update_seconds": spread([rank.update_seconds for rank in ranks]),
        "forward_backward_seconds": without_update,
        "forward_backward_tflops": totals["training"] / without_update / len(ranks),
        "peak_tflops": peak_tflops,
        "mfu": None if peak_tflops is None else speed["step"] / peak_tflops,
        "peak_memory_gib": memory,
        "metrics": {
            key: statistics.fmean(result.metrics[key] for result in results if key in result.metrics)
            for key in sorted(set().union(*(result.metrics for result in results)))
        },
        "communication": None,
        "profile": None,
    }


def scored(config: Config, result: StepResult) -> Sequence[RolloutGroup]:
    """The groups whose old log-probs take a forward pass of their own."""
    from gspo_moe.training.old_policy import first_scored

    groups, mini_batches = result.batch.groups, config.algorithm.mini_batches
    first = first_scored(config) if config.algorithm.old_log_probs == "trainer" else mini_batches
    return groups[first * len(groups) // mini_batches :]


def needed_flops(
    architecture: Architecture, groups: Sequence[RolloutGroup], scored: Sequence[RolloutGroup]
) -> dict[str, dict[str, int]]:
    """Operations that RL steps on these groups need, by phase and part; scored: those that `scored` names."""
    sampling = [
        generation(len(group.rollouts[0].prompt_ids), [len(rollout.response_ids) for rollout in group.rollouts])
        for group in groups
    ]
    return {
        "rollout": forward_flops(architecture, sum(sampling, Work())),
        "old_log_probs": forward_flops(architecture, one_pass(scored)),
        "training": {part: TRAINING_PASSES * n for part, n in forward_flops(architecture, one_pass(groups)).items()},
    }


def one_pass(groups: Sequence[RolloutGroup]) -> Work:
    rollouts = all_rollouts(groups)
    responses = sum(sum(rollout.policy_mask[1:]) for rollout in rollouts)
    return whole_sequences((len(rollout.token_ids) - 1 for rollout in rollouts), logits=responses)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def show(found: dict[str, Any]) -> None:
    console = Console(width=100, highlight=False)
    console.print(
        f"{found['processes']} x {found['device']}, {found['dtype']}, {found['parameters'] / 1e6:,.2f} M parameters, "
        f"{found['active_parameters'] / 1e6:,.2f} M active"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column(f"mean of {found['steps']} steps")
    for title in ("s, min", "median", "max over ranks", "TFLOP", "TFLOP/s a process"):
        table.add_column(title, justify="right")
    totals = {phase: sum(parts.values()) for phase, parts in found["tflop"].items()}
    totals["step"] = sum(totals.values())
    for phase, seconds in found["seconds"].items():
        row = [f"{seconds[figure]:.3f}" for figure in ("min", "median", "max")]
        if phase in totals:
            row += [f"{totals[phase]:.3g}", f"{found['tflops_per_process'][phase]:.3g}"]
        table.add_row(phase, *row)
    console.print(table)
    console.print(
        f"training without the optimizer's {found['update_seconds']['max']:.3f} s: "
        f"{found['forward_backward_seconds']:.3f} s, {found['forward_backward_tflops']:.3g} TFLOP/s a process"
    )
    console.print(
        f"{found['tokens_per_second']:,.0f} tokens/s trained on, over the step; "
        f"{found['rollout_tokens_per_second']:,.0f} tokens/s generated, over the rollout"
    )
    if found["mfu"] is None:
        console.print("MFU: the device's peak is not known here; give it with --peak-tflops")
    else:
        console.print(f"MFU: {found['mfu']:.2%} of {found['peak_tflops']:g} TFLOP/s a process")
    if found["profile"] is not None:
        console.print("in the profiled step: {launches:,} launches, {waits:,} waits".format(**found["profile"]))
    if found["communication"] is not None:
        console.print(
            "first rank, a step: {messages:,} messages, {sent_bytes:,} bytes sent".format(**found["communication"])
        )
    for place, gib in found["peak_memory_gib"].items():
        console.print(f"peak memory, {place}: {gib['min']:.2f} to {gib['max']:.2f} GiB a process")


if __name__ == "__main__":
    sys.exit(main())
