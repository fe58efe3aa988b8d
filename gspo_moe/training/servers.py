"""How a run's rollout servers get its weights, and what the trainer makes of the tokens that probe them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.parallel.reduce import from_last_stage
from gspo_moe.rollout.engine import WeightSink
from gspo_moe.rollout.servers.broadcast_sink import BroadcastSink
from gspo_moe.rollout.servers.folder_sink import FolderSink
from gspo_moe.rollout.servers.ipc_sink import IpcSink
from gspo_moe.rollout.servers.opening import Opened
from gspo_moe.rollout.servers.probe import TOLERANCES, Probe, probe_ids
from gspo_moe.rollout.servers.records import Servers
from gspo_moe.rollout.servers.transfers import SglangTransfer, VllmTransfer
from gspo_moe.scoring.score import score
from gspo_moe.types import TrainingSample

WEIGHTS = "weights"  # in the run's folder


def make_sink(config: Config, servers: Opened, vocab: int) -> WeightSink:
    """As `rollout.servers.sync` has it, with a probe behind each sync. vocab: tokens there are."""
    options = config.rollout.servers
    fleet = cast(Servers, servers.fleet)  # the first rank, which has one, is the one that asks
    exact = config.model.dtype == "fp32" and servers.dtype == "fp32"
    probe = Probe(fleet, servers.dialect, probe_ids(vocab), log_probs_of, TOLERANCES["fp32" if exact else "bf16"])
    if options.sync == "folder":
        return FolderSink(fleet, servers.dialect, weights_folder(config), probe)
    if options.sync == "ipc":
        return IpcSink(fleet, servers.dialect, probe)
    transfer = VllmTransfer() if config.rollout.engine == "vllm" else SglangTransfer()
    address = options.address or os.environ.get("MASTER_ADDR", "127.0.0.1")
    return BroadcastSink(fleet, servers.dialect, transfer, probe, address)


def weights_folder(config: Config) -> Path:
    """Absolute, as servers have working folders of their own."""
    folder = config.rollout.servers.folder
    return (config.run_path / WEIGHTS if folder is None else Path(folder)).absolute()


def log_probs_of(model: Any, token_ids: tuple[int, ...]) -> list[float]:
    """Each token's after the first (nats, temperature 1), on every rank. model: a `model.build.Model`. Collective."""
    scored = len(token_ids) - 1
    sample = TrainingSample(token_ids, (0,) + (1,) * scored, rollout_log_probs=(0.0,) * scored)
    found = score(model, [pack([sample], [0])])
    return from_last_stage(found[0].tolist() if found else None, model.groups)
