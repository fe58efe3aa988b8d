"""Device choice, and the one place that lets megatron-core run without a GPU."""

from gspo_moe.platform.backend import Backend, Backends, choose_backends, has_nvidia_apex, has_transformer_engine
from gspo_moe.platform.determinism import deterministic_algorithms, prepare_determinism
from gspo_moe.platform.device import Device, device, peak_rss_gib
from gspo_moe.platform.megatron_cpu import ANSWERS, Answer, check_megatron_version, megatron_version, prepare_megatron
from gspo_moe.platform.megatron_fallbacks import adam_of, use_torch_kernels

__all__ = [
    "ANSWERS",
    "Answer",
    "Backend",
    "Backends",
    "Device",
    "adam_of",
    "check_megatron_version",
    "choose_backends",
    "deterministic_algorithms",
    "device",
    "has_nvidia_apex",
    "has_transformer_engine",
    "megatron_version",
    "peak_rss_gib",
    "prepare_determinism",
    "prepare_megatron",
    "use_torch_kernels",
]
