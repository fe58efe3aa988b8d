"""What runs inside vLLM's workers: weights from a folder or from a broadcast into the running model, by vLLM's reload.

Loaded in vLLM's environment with this project on PYTHONPATH (`--worker-extension-cls gspo_moe.rollout.servers.worker
.Extension`): it imports torch, safetensors and vLLM 0.32, and of this project only what does no more.

vLLM's reload on a CPU leaves the experts' weights as the checkpoint has them, where its kernel wants them packed: the
packing hangs on the making of the kernel, which happens once. So the kernel is forgotten before each update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from gspo_moe.rollout.servers.buckets import TensorHead, empty_bucket, views
from gspo_moe.rollout.servers.transfer_group import ROOT, await_broadcast, join_transfer_group, start_broadcast

BACKEND = "gspo_moe"  # what `--weight-transfer-config '{"backend": "gspo_moe"}'` names

Named = Iterable[tuple[str, torch.Tensor]]


class Extension:
    """Mixed into vLLM's worker; its methods are called through `/collective_rpc`."""

    model_runner: Any
    vllm_config: Any

    def load_folder(self, folder: str, version: int) -> dict[str, int]:
        """Takes the safetensors of an HF folder; how many tensors and bytes they were. Call while generation pauses.

        Raises RuntimeError where the folder does not hold every parameter of the model.
        """
        model, config = self.model_runner.get_model(), self.vllm_config.model_config
        wanted = {name for name, _ in model.named_parameters()}
        counted = {"version": version, "tensors": 0, "bytes": 0}
        with set_current_vllm_config(self.vllm_config):
            begin_update(model)
            try:
                loaded = model.load_weights(_counting(folder_tensors(Path(folder)), counted))
            finally:
                finish_update(model, config)
        missing = sorted(wanted - set(loaded))
        if missing:
            raise RuntimeError(f"{folder} does not hold {', '.join(missing[:10])}")
        return counted

    def abandon_update(self) -> None:
        """Ends an update of which not all came, so that another can begin; until then the weights are no policy's.

        Where none is under way it does nothing. For vLLM one is over in which a worker failed, though that
        worker's layers are still in it.
        """
        with set_current_vllm_config(self.vllm_config):
            finish_update(self.model_runner.get_model(), self.vllm_config.model_config)
        self._weight_update_active = False  # vLLM's


def begin_update(model: torch.nn.Module) -> None:
    """Makes the model ready to take a whole checkpoint by `load_weights`."""
    if current_platform.is_cpu():
        for method in _expert_methods(model):
            if method.moe_kernel is not None:
                method.kernel_before, method.moe_kernel = method.moe_kernel, None
    initialize_layerwise_reload(model)


def finish_update(model: torch.nn.Module, config: Any) -> None:
    """Layers that got no weights keep those they had, and their kernel."""
    finalize_layerwise_reload(model, config)
    for method in _expert_methods(model):
        if method.moe_kernel is None:
            method.moe_kernel = getattr(method, "kernel_before", None)


def _expert_methods(model: torch.nn.Module) -> list[Any]:
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    return [method for method in methods if isinstance(method, UnquantizedFusedMoEMethod)]


def folder_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def _counting(tensors: Named, counted: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        counted["tensors"] += 1
        counted["bytes"] += tensor.nbytes
        yield name, tensor


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Of `/init_weight_transfer_engine`: where the trainer waits. rank_offset: of this server's first worker."""

    address: str
    port: int
    world_size: int
    rank_offset: int
    group_name: str
    backend: str
    timeout_seconds: float


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """Of `/update_weights`: the tensors that lie one behind the other in the bucket that is about to be broadcast."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class BroadcastEngine(WeightTransferEngine[JoinInfo, BucketInfo]):
    """vLLM's weight-transfer API over torch.distributed: NCCL between GPUs, gloo between CPUs."""

    init_info_cls = JoinInfo
    update_info_cls = BucketInfo
    _group: torch.distributed.ProcessGroup | None = None
    _timeout = 0.0

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        parallel = self.parallel_config
        own = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.shutdown()
        self._timeout = init_info.timeout_seconds
        self._group = join_transfer_group(
            init_info.address,
            init_info.port,
            rank=init_info.rank_offset + own,
            world_size=init_info.world_size,
            name=init_info.group_name,
            backend=init_info.backend,
            timeout_seconds=init_info.timeout_seconds,
        )

    def start_weight_update(self) -> None:
        begin_update(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketInfo) -> None:
        if self._group is None:
            raise RuntimeError("update_weights came before init_weight_transfer_engine")
        parts = zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True)
        heads = [TensorHead(name, dtype, tuple(shape)) for name, dtype, shape in parts]
        bucket = empty_bucket(heads, self.device)
        await_broadcast(start_broadcast(bucket, self._group, ROOT), self._group, self._timeout)
        self.model.load_weights(zip(update_info.names, views(bucket, heads), strict=True))

    def finish_weight_update(self) -> None:
        finish_update(self.model, self.model_config)

    def shutdown(self) -> None:
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, BroadcastEngine)
if current_platform.is_cpu():
    from gspo_moe.rollout.servers.worker_routes import record_routes

    record_routes()
