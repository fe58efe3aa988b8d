"""Device choice, and the one place that lets megatron-core run without a GPU."""

from gspo_moe.platform.backend import Backend, choose_backend, has_nvidia_apex, has_transformer_engine
from gspo_moe.platform.device import Device, device, peak_rss_gib
from gspo_moe.platform.megatron_cpu import ANSWERS, Answer, check_megatron_version, megatron_version, prepare_megatron

__all__ = [
    "ANSWERS",
    "Answer",
    "Backend",
    "Device",
    "check_megatron_version",
    "choose_backend",
    "device",
    "has_nvidia_apex",
    "has_transformer_engine",
    "megatron_version",
    "peak_rss_gib",
    "prepare_megatron",
]
