"""What the config says of servers that cannot take the trainer's weights."""

import pytest
from pydantic import ValidationError

from gspo_moe.config.schema import Config


def config(engine: str, sync: str) -> Config:
    servers = {"urls": ["http://a:1"], "sync": sync}
    return Config.model_validate({"model": "tiny", "rollout": {"engine": engine, "servers": servers}})


def test_cuda_ipc_is_for_vllm() -> None:
    for engine, sync in (("vllm", "ipc"), ("sglang", "broadcast"), ("sglang", "folder")):
        assert config(engine, sync).rollout.servers.sync == sync
    with pytest.raises(ValidationError, match=r"set rollout\.servers\.sync to folder or broadcast"):
        config("sglang", "ipc")
