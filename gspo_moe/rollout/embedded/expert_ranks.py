"""The experts of a layer on a step's tokens, wherever tokens and experts are.

Shape letters: as in `rollout.embedded.lean`; U ranks of those that share the experts with sequences of their own, E
experts of this rank, B bytes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_moe.model.build import Model
from gspo_moe.model.experts import GroupedExperts


class ExpertRanks:
    """Who has which experts of a stage, and whose tokens they get."""

    def __init__(self, model: Model) -> None:
        groups, layout = model.groups, model.groups.layout
        self._group = groups.experts
        # Ranks are numbered tensor rank first, then context and data: the tensor ranks of one copy have its tokens all.
        holders = [
            rank // layout.tensor % (layout.context * layout.data) for rank in dist.get_process_group_ranks(self._group)
        ]
        self._holders = sorted(set(holders))
        self._first = torch.tensor([holders.index(one) for one in self._holders])
        self._place = self._holders.index(groups.data_context.rank())
        self._local = model.architecture.num_experts // layout.expert
        self._start = groups.expert.rank() * self._local

    def mix(
        self,
        experts: GroupedExperts,
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
        sums_RH = self._run(experts, *tokens)
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
            F.pad(routes_NK.int(), (0, 0, 0, missing), value=-1),
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

    def _run(
        self, experts: GroupedExperts, hidden_RH: torch.Tensor, weights_RK: torch.Tensor, routes_RK: torch.Tensor
    ) -> torch.Tensor:
        """What this rank's experts add to each token, fp32 [R, H]."""
        topk = routes_RK.shape[1]
        local_X = routes_RK.flatten() - self._start
        whole = self._group.size() == 1
        if not whole:  # other ranks' experts behind its own
            local_X = local_X.masked_fill((local_X < 0) | (local_X >= self._local), self._local)
        expert_X, order_X = local_X.sort(stable=True)
        counts_E = (expert_X == torch.arange(self._local, device=expert_X.device)[:, None]).sum(1)
        if not whole and expert_X.device.type == "cpu":
            order_X = order_X[: int(counts_E.sum())]  # elsewhere it would have to be waited for
        rows_XH, _ = experts(hidden_RH[order_X // topk], counts_E, weights_RK.flatten()[order_X])
        found_XH = rows_XH.new_zeros(len(expert_X), rows_XH.shape[1])
        found_XH[order_X] = rows_XH
        if not whole:
            found_XH.masked_fill_((local_X == self._local)[:, None], 0)
        return found_XH.view(len(routes_RK), topk, -1).sum(1, dtype=torch.float32)
