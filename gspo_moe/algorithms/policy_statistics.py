"""What is counted of a policy loss. Shape letters: T tokens of a pack, N sequences of it."""

from __future__ import annotations

import torch

from gspo_moe.algorithms.ratios import Objective, Segments, k3_from_sampler, on_response, weighted
from gspo_moe.algorithms.statistics import Parts, Statistics, spread, spread_metrics
from gspo_moe.algorithms.value import value_metrics

OWN = "own/"  # before the names of an objective's `token_sums`


class PolicyStatistics(Statistics):
    """Loss, clip fractions and ratios of any number of packs; what is optional, all with or all without."""

    @classmethod
    @torch.no_grad()
    def of_pack(cls, log_ratio_T: torch.Tensor, objective: Objective, segments: Segments) -> PolicyStatistics:
        """log_ratio_T: float64, d of `log_ratios`."""
        share_N = segments.share_N
        token_sums, token_maxima = spread("token", log_ratio_T, segments.response_T.double())
        sequence_sums, sequence_maxima = spread("sequence", segments.mean(log_ratio_T), share_N)
        sums = {
            "tokens": segments.response_T.double().sum(),
            "sequences": share_N.sum(),
            "objective": weighted(objective.value_N, share_N).sum(),
            "clipped_tokens": (share_N * objective.clipped_tokens_N).sum(),
            "clipped_sequences": (share_N * (objective.clipped_tokens_N > 0)).sum(),
            "k3": k3_from_sampler(log_ratio_T).sum(),
        }
        own = {f"{OWN}{name}": value for name, value in objective.token_sums.items()}
        return cls({**sums, **token_sums, **sequence_sums, **own}, {**token_maxima, **sequence_maxima})

    def to_metrics(self) -> dict[str, float]:
        """Clip fractions of SPEC section 1; `kl/old_k3`, of KL(old || policy), is the mean over response tokens.

        `loss/policy` is -1/n sum_i J_i over the n sequences merged so far, whatever `num_sequences` the losses were
        scaled by.
        """
        tokens, sequences = self.sums["tokens"].item(), self.sums["sequences"].item()
        metrics = {
            "loss/policy": -self.sums["objective"].item() / sequences,
            "clip_fraction/sequence": self.sums["clipped_sequences"].item() / sequences,
            "clip_fraction/token": self.sums["clipped_tokens"].item() / tokens,
            "kl/old_k3": self.sums["k3"].item() / tokens,
            **spread_metrics("token", "ratio/token", self, tokens),
            **spread_metrics("sequence", "ratio/sequence", self, sequences),
        }
        if "kl_tokens" in self.sums:
            metrics["kl/reference"] = self.sums["kl_tokens"].item() / tokens
            metrics["loss/kl"] = self.sums["kl_penalty"].item() / sequences
        if "router_shift" in self.sums:
            metrics["router_shift/mean"] = self.sums["router_shift"].item() / tokens
        if "entropy" in self.sums:
            metrics["policy/entropy"] = self.sums["entropy"].item() / tokens
        if "off_policy_dropped" in self.sums:
            metrics["off_policy_mask/dropped"] = self.sums["off_policy_dropped"].item() / tokens
        own = {name.removeprefix(OWN): value for name, value in self.sums.items() if name.startswith(OWN)}
        metrics |= {name: value.item() / tokens for name, value in own.items()}
        if "value_loss" in self.sums:
            metrics |= value_metrics(self.sums, tokens)
        return metrics

    def with_values(self, sums: Parts) -> PolicyStatistics:
        """The same with the sums of `value_loss` of the same packs."""
        return PolicyStatistics({**self.sums, **sums}, self.maxima)

    @torch.no_grad()
    def with_reference(self, kl_T: torch.Tensor, penalty_N: torch.Tensor, segments: Segments) -> PolicyStatistics:
        """The same with the KL to a reference: its estimate on each token, 0 off the response, and what it costs."""
        found = {"kl_tokens": kl_T.sum(), "kl_penalty": weighted(penalty_N, segments.share_N).sum()}
        return PolicyStatistics({**self.sums, **found}, self.maxima)

    @torch.no_grad()
    def with_token_sum(self, name: str, values_T: torch.Tensor, segments: Segments) -> PolicyStatistics:
        """The same with the sum over response tokens of `router_shift`, of the `entropy` or of `off_policy_dropped`."""
        return PolicyStatistics({**self.sums, name: on_response(values_T, segments).sum()}, self.maxima)
