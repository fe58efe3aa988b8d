"""What the config says of servers that cannot take the trainer's weights."""

import pytest

from gspo_moe.config.rules import servers_can_take_weights
from gspo_moe.config.schema import Config


@pytest.mark.parametrize(
    ("engine", "sync", "faults"),
    [("vllm", "ipc", 0), ("sglang", "broadcast", 0), ("sglang", "folder", 0), ("sglang", "ipc", 1)],
)
def test_cuda_ipc_is_for_vllm(engine: str, sync: str, faults: int) -> None:
    servers = {"urls": ["http://a:1"], "sync": sync}
    config = Config.model_validate({"model": "tiny", "rollout": {"engine": engine, "servers": servers}})
    found = list(servers_can_take_weights(config))
    assert len(found) == faults
    assert all("set rollout.servers.sync to folder or broadcast" in fault for fault in found)
