"""A plugin of vLLM (`vllm.general_plugins`) for machines without a GPU; `tools/setup_vllm_cpu.sh` registers it.

It lets `--enable-return-routed-experts` pass where our worker extension does what vLLM's CPU runner does not, and asks
the kernel for the CPU's tile registers, without which bf16 ends in SIGILL. vLLM calls `register` in all its processes.
"""

from __future__ import annotations

import functools
from typing import Any

EXTENSION = "gspo_moe.rollout.servers.worker.Extension"


def register() -> None:
    import torch
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    torch.cpu._init_amx()
    verify = VllmConfig._verify_aux_output_compatibility

    @functools.wraps(verify)
    def verify_with_extension(self: Any) -> None:
        if self.parallel_config.worker_extension_cls != EXTENSION:
            verify(self)
            return
        # Platforms of other packages bring a runner of their own, as our extension does; the other checks stay.
        current_platform.is_out_of_tree = lambda: True
        try:
            verify(self)
        finally:
            del current_platform.is_out_of_tree

    VllmConfig._verify_aux_output_compatibility = verify_with_extension
