"""Routes put together over tensor ranks, in every integer type that a recorder keeps."""

import torch

from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.routing.shards import gather_tokens
from tests.launch import launch
from tests.qwen3 import layout


def check_gathering() -> None:
    groups = initialize(layout(2, tensor=2), seed=1)
    for dtype, experts in ((torch.uint8, 256), (torch.int16, 320), (torch.float32, 320)):
        whole = torch.randint(experts, (10, 3, 2), generator=torch.Generator().manual_seed(5)).to(dtype)
        found = gather_tokens(whole.chunk(2)[groups.tensor.rank()], groups)
        assert found.dtype is dtype
        assert torch.equal(found, whole)
    shut_down()


def test_tensor_ranks_routes_are_joined_in_their_own_type() -> None:
    launch(check_gathering, 2)
