"""Shows that every parallel layout gives the numbers of one process: `python tools/check_layouts.py`.

For each layout a small random model takes three GSPO steps on the same sequences, the third with replayed routes.
Compared with the run of one process, tensor by tensor (largest difference over largest value): loss, gradient norm,
every gathered gradient of the first step, parameters after the third step, log-probs and routing metrics; routes and
greedy text must be equal. Exit code 1 where something differs by more than the tolerance.

Shape letters: T tokens of a pack, N sequences of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from tools.layout_cases import WITHOUT_EXPERT_TENSOR, WITHOUT_OVERLAP, Case, cases, refused

VOCAB, TOPK = 61, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": TOPK, "initializer_range": 0.2,
    "max_position_embeddings": 128, "rope_theta": 10_000.0,
}  # fmt: skip
TOLERANCE = 1e-5
STEPS = 3
TIMEOUT_MINUTES = 3.0
SEQUENCES = 16
RESULTS = "results.jsonl"
# The libraries warn of each missing package on every rank.
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
COLUMNS = ("loss", "grad_norm", "gradients", "parameters", "log_probs", "routing", "routes", "greedy")


def observe(case: Case) -> dict[str, Any]:
    """Everything that must not depend on the layout; complete on the first rank. Collective."""
    from gspo_moe.config import check_layout, load_config
    from gspo_moe.model.build import build_model
    from gspo_moe.model.weights import RandomSource, load_weights
    from gspo_moe.parallel.groups import initialize, leave_layout
    from gspo_moe.platform import megatron_version
    from gspo_moe.routing.recorder import RouteRecorder

    config = load_config(None, [*_settings(), *(f"parallel.{k}={v}" for k, v in case.parallel.items()), *case.more])
    architecture = config.model.architecture()
    layout = check_layout(config, architecture, case.world, megatron_version())
    if case.wrong == WITHOUT_EXPERT_TENSOR:
        layout = dataclasses.replace(layout, expert_tensor=1, expert_data=case.world)
    groups = initialize(layout, seed=1, timeout_minutes=TIMEOUT_MINUTES)
    model = build_model(config, architecture, groups)
    if case.wrong == WITHOUT_OVERLAP:
        model.config.overlap_p2p_comm, model.config.batch_p2p_comm = False, True
    load_weights(model, RandomSource(architecture, seed=3))
    found: dict[str, Any] = {"greedy": _greedy(model)}
    recorder = RouteRecorder(model.chunks, architecture, groups, scores=True)
    found |= _train(config, model, recorder)
    leave_layout()
    return found


def _settings() -> list[str]:
    sizes = ", ".join(f"{name}: {value}" for name, value in SIZES.items())
    # Adam divides by the root of squared gradients; with its usual eps it would turn rounding of the tiniest gradients
    # into whole steps.
    optimizer = ["optimizer.lr=1e-2", "optimizer.eps=1e-3", "optimizer.clip_grad=0.05"]
    batch = [f"rollout.prompts_per_step={SEQUENCES * STEPS // 2}", f"algorithm.mini_batches={STEPS}"]
    group = ["rollout.samples_per_prompt=2", "schedule.micro_batch_tokens=160"]
    return ["model=tiny", f"model.overrides={{{sizes}}}", *optimizer, *batch, *group]


def _samples(number: int) -> list[Any]:
    """The sequences of one mini-batch, the same in every layout."""
    from gspo_moe.types import TrainingSample

    generator = torch.Generator().manual_seed(100 + number)
    samples = []
    for _ in range(SEQUENCES):
        prompt, response = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 24))
        ids = torch.randint(VOCAB, (prompt + response,), generator=generator).tolist()
        advantage = float(torch.randn((), generator=generator))
        mask = (0,) * prompt + (1,) * response
        samples.append(TrainingSample(tuple(ids), mask, advantage))
    return samples


def _greedy(model: Any) -> list[tuple[int, ...]]:
    from gspo_moe.parallel.reduce import gather_over_data
    from gspo_moe.rollout.embedded.engine import MegatronEngine
    from gspo_moe.rollout.engine import Request, SamplingParams

    params = SamplingParams(0.0, 1.0, 0, max_response_tokens=12, stop_ids=frozenset({5}), seed="")
    requests = [Request(str(i), tuple(range(1 + i, 4 + 2 * i)), samples=1) for i in range(8)]
    ranks, rank = model.groups.data.size(), model.groups.data_rank
    share = requests[rank * len(requests) // ranks : (rank + 1) * len(requests) // ranks]
    engine = MegatronEngine(model, max_batch=3, prefill_tokens=16)
    mine = [rollouts[0].response_ids for rollouts in engine.generate(share, params)]
    return [ids for part in gather_over_data(mine, model.groups) for ids in part]


def _train(config: Any, model: Any, recorder: Any) -> dict[str, Any]:
    from gspo_moe.model.hf import whole_tensors
    from gspo_moe.routing.comparison import gather_layers
    from gspo_moe.scoring.score import score
    from gspo_moe.training.optimizer import Optimizer
    from gspo_moe.training.packs import Minibatch, microbatches, pack_share, recordings_of, with_each
    from gspo_moe.training.routing import compare_packs
    from gspo_moe.training.step import PolicySettings, train_minibatch

    found: dict[str, Any] = {"loss": [], "grad_norm": [], "routing": []}
    gradients: dict[str, torch.Tensor] = {}
    log_probs: dict[tuple[int, int], Any] = {}
    routes: dict[tuple[int, int], Any] = {}

    class WatchedOptimizer(Optimizer):
        first = not config.parallel.distributed_optimizer  # which leaves each rank a share of the reduced gradients

        def update(self, **given: Any) -> Any:
            if self.first:
                self.first = False
                gradients.update((name, t.clone()) for name, t in whole_tensors(model, attrgetter("main_grad")))
            return super().update(**given)

    optimizer = WatchedOptimizer(config, model, STEPS)
    minibatches = [pack_share(_samples(step), model.groups, config) for step in range(STEPS)]
    every = [pack for packs in minibatches for pack in microbatches(packs)]
    record = recorder.start()
    scored = score(model, every, record=record)
    old_routes = record.recordings()
    noise = [_noise(step, pack) for step, packs in enumerate(minibatches) for pack in microbatches(packs)]
    old_log_probs = [log_probs_T + noise_T for log_probs_T, noise_T in zip(scored, noise, strict=False)]
    start = 0
    for step, packs in enumerate(minibatches):
        stop = start + len(packs)
        own = [recording.routes_TLK for recording in old_routes[start:stop]]
        # The last step replays routes that no router picked: every choice moved on by one expert.
        moved = [(routes_TLK + 1) % SIZES["num_experts"] for routes_TLK in own] if step == STEPS - 1 else None
        known = {"old_log_probs_T": old_log_probs[start:stop], "recording": old_routes[start:stop]}
        whole = with_each(packs, **known, replay_TLK=moved or ())
        num_tokens = sum(sum(sample.response_mask[1:]) for sample in _samples(step))
        minibatch = Minibatch(tuple(whole), SEQUENCES, num_tokens)
        settings = PolicySettings(config.algorithm, temperature=1.0, max_response_tokens=0)
        result = train_minibatch(model, optimizer, minibatch, settings, recorder)
        metrics = result.statistics.to_metrics()
        found["loss"].append([metrics["loss/policy"], metrics["clip_fraction/token"], metrics["ratio/token_max"]])
        found["grad_norm"].append(result.update.grad_norm)
        sums = compare_packs(microbatches(packs), old_routes[start:stop], recordings_of(result.packs), recorder.layers)
        found["routing"].append([value for value in sums.to_metrics().values() if isinstance(value, float)])
        for number, pack in enumerate(microbatches(packs), start=start):
            whole_routes = gather_layers(old_routes[number].routes_TLK, recorder.layers).sort(dim=-1).values
            routes |= _by_sample(step, pack, whole_routes)
            log_probs |= _by_sample(step, pack, scored[number]) if scored else {}
        start = stop
    found["gradients"] = gradients
    found["parameters"] = {name: tensor.clone() for name, tensor in whole_tensors(model)}
    found["log_probs"] = _gathered(log_probs, model.groups, last_stage=True)
    found["routes"] = _gathered(routes, model.groups)
    return found


def _by_sample(step: int, pack: Any, values: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    pieces = values.split(pack.cu_seqlens.diff().tolist())
    return {(step, sample): piece.clone() for sample, piece in zip(pack.sample_indices, pieces, strict=True)}


def _noise(step: int, pack: Any) -> torch.Tensor:
    """What makes old log-probs differ from the policy's: by sequence, whatever pack it is in."""
    pieces = []
    for sample, length in zip(pack.sample_indices, pack.cu_seqlens.diff().tolist(), strict=True):
        generator = torch.Generator().manual_seed(1000 * step + sample)
        pieces.append(2e-3 * torch.randn(length, generator=generator))
    return torch.cat(pieces)


def _gathered(values: dict[tuple[int, int], Any], groups: Any, last_stage: bool = False) -> torch.Tensor:
    from gspo_moe.parallel.reduce import from_last_stage, gather_over_data

    mine = from_last_stage(values, groups) if last_stage else values
    merged: dict[tuple[int, int], Any] = {}
    for part in gather_over_data(mine, groups):
        merged |= part
    return torch.cat([merged[key] for key in sorted(merged)])


def compare(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference a column; 0 or infinity for what must be equal; absent where nothing was observed."""
    worst: dict[str, float] = {}
    for column in COLUMNS:
        ours, theirs = found[column], reference[column]
        if column in ("routes", "greedy"):
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            worst[column] = 0.0 if same else float("inf")
        elif isinstance(ours, dict):
            if ours:
                worst[column] = max(_relative(ours[name], theirs[name]) for name in theirs)
        else:
            worst[column] = _relative(torch.as_tensor(ours), torch.as_tensor(theirs))
    return worst


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference, scale = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    return float(difference / scale) if scale else float(difference)


def work(folder: Path, names: Sequence[str]) -> None:
    """Runs the named cases of this job's world size, in the matrix's order.

    The first rank prints each one's row, adds its differences to RESULTS and leaves what references observed.
    """
    torch.set_num_threads(1)
    for case in cases() + refused():
        if case.name not in names:
            continue
        found = observe(case)
        if int(os.environ["RANK"]) == 0:
            kept = folder / f"{case.reference}.pt"
            if case.name == case.reference:
                torch.save(found, kept)
            worst = compare(found, torch.load(kept, weights_only=False))
            print(row(case, worst), flush=True)
            with (folder / RESULTS).open("a") as results:
                print(json.dumps([case.name, worst]), file=results)


def run(worlds: Sequence[int], names: Sequence[str] | None = None) -> list[tuple[Case, dict[str, float]]]:
    """Observes the matrix's cases of these world sizes (or those named) and compares each with one process."""
    chosen = [case for case in cases() if names is None and case.world in worlds]
    chosen += [case for case in cases() + refused() if names is not None and case.name in names]
    references = {case.reference for case in chosen}
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted({1, *(case.world for case in chosen)}):
            needed = {case.name for case in chosen if case.world == world} | (references if world == 1 else set())
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            command = [*launcher, __file__, "--worker", folder, *sorted(needed)]
            subprocess.run(command, check=True, env=os.environ | QUIET)
        worst = dict(map(json.loads, (Path(folder) / RESULTS).read_text().strip().split("\n")))
    return [(case, worst[case.name]) for case in chosen]


def header() -> str:
    return "\n".join(["| processes: layout | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)])


def row(case: Case, worst: dict[str, float]) -> str:
    """Markdown: the largest relative difference a column."""
    return f"| {case.name} | " + " | ".join(_cell(column, worst.get(column)) for column in COLUMNS) + " |"


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column in ("routes", "greedy"):
        return "equal" if value == 0.0 else "**differ**"
    return f"{value:.0e}" if value <= TOLERANCE else f"**{value:.0e}**"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares every parallel layout with one process.")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8], help="world sizes to check")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from gspo_moe.platform import megatron_version

    if options.worker:
        work(Path(options.worker[0]), options.worker[1:])
        return 0
    print(header(), flush=True)
    results = run(options.worlds)
    print(f"\nWhat is refused, with megatron-core {megatron_version()}:\n\n{header()}", flush=True)
    run([], [case.name for case in refused()])
    failed = [case.name for case, worst in results if max(worst.values()) > TOLERANCE]
    print(f"\n{len(results) - len(failed)} of {len(results)} layouts within {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
