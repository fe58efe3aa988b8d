"""The experts of a layer on a step's tokens, wherever tokens and experts are.

Shape letters: as in `rollout.embedded.lean`; S ranks that share the experts, B bytes of a row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_moe.model.build import Model
from gspo_moe.parallel.groups import Groups
from gspo_moe.rollout.embedded.arithmetic import Arithmetic, Experts


def experts_holders(groups: Groups) -> list[int]:
    """Of each rank that shares this rank's experts, in their order: whose tokens it has, by its rank in data_context.

    Ranks are numbered tensor rank first, then context and data: the tensor ranks of one copy have its tokens all.
    """
    layout, ranks = groups.layout, dist.get_process_group_ranks(groups.experts)
    return [rank // layout.tensor % (layout.context * layout.data) for rank in ranks]


class ExpertRanks:
    """Who has which experts of a stage, and whose tokens they get."""

    def __init__(self, model: Model) -> None:
        groups, layout = model.groups, model.groups.layout
        self._group = groups.experts
        holders = experts_holders(groups)
        self._holders = sorted(set(holders))
        self._first = torch.tensor([holders.index(one) for one in self._holders])
        self._place = self._holders.index(groups.data_context.rank())
        self._start = groups.expert.rank() * (model.architecture.num_experts // layout.expert)

    def mix(
        self,
        arithmetic: Arithmetic,
        experts: Experts,
        hidden_NH: torch.Tensor,
        weights_NK: torch.Tensor,
        routes_NK: torch.Tensor,
        most: int,
    ) -> torch.Tensor:
        """The weighted sum [N, H] of each token's experts. Collective over the ranks that share them."""
        count, shared = len(hidden_NH), len(self._holders) > 1
        tokens = (hidden_NH, weights_NK, routes_NK)
        if shared:
            tokens = self._gather(*tokens, most)
        sums_RH = arithmetic.mix(experts, *tokens, self._start)
        if self._group.size() > 1:
            dist.all_reduce(sums_RH, group=self._group)
        mine_NH = sums_RH[self._place * most :][:count] if shared else sums_RH
        return mine_NH.to(hidden_NH.dtype)

    def _gather(
        self, hidden_NH: torch.Tensor, weights_NK: torch.Tensor, routes_NK: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every holder's tokens in `most` rows each; rows without one go to no expert. As bytes, in one collective."""
        missing = most - len(hidden_NH)
        fields = [
            F.pad(hidden_NH, (0, 0, 0, missing)),
            F.pad(weights_NK, (0, 0, 0, missing)),
            F.pad(routes_NK, (0, 0, 0, missing), value=-1),
        ]
        mine_MB = torch.cat([each.contiguous().view(torch.uint8) for each in fields], dim=1)
        size, width = self._group.size(), mine_MB.shape[1]
        all_B = mine_MB.new_empty(size * most * width)
        dist.all_gather_into_tensor(all_B, mine_MB.flatten(), group=self._group)
        every_SMB = all_B.view(size, most, width)
        if size > len(self._holders):
            every_SMB = every_SMB[self._first.to(every_SMB.device)]
        parts = every_SMB.flatten(0, 1).split([each.shape[1] * each.element_size() for each in fields], dim=1)
        hidden, weights, routes = (p.contiguous().view(f.dtype) for p, f in zip(parts, fields, strict=True))
        return hidden, weights, routes
