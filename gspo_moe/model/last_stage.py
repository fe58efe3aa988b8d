"""What the last pipeline stage gives of a pack: log-probs, values or logits, whichever a caller asks for.

Everything here is differentiable and knows of padding, tensor and sequence parallelism and of rows of the vocabulary
that are no tokens. Under context parallelism the tokens are this rank's part of the pack.

Shape letters: T tokens of a pack, P tokens with padding (under sequence parallelism this rank's part of them), N chosen
tokens, H hidden, V this tensor rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from gspo_moe.kernels import TokenLogProbs, VocabShard, linear_token_log_probs, token_log_probs
from gspo_moe.model.build import Model


@dataclass(frozen=True)
class LastStage:
    """One pack's final hidden states [P, H] on the last stage, where `model.forward.run` made them; num_tokens: T."""

    model: Model
    hidden_PH: torch.Tensor
    num_tokens: int

    def log_probs(
        self,
        targets_T: torch.Tensor,
        temperature: float = 1.0,
        *,
        entropy: bool = False,
        positions_N: torch.Tensor | None = None,
    ) -> TokenLogProbs:
        """Log-probs [T] (nats, fp32) of the targets at `temperature`, over the `vocab` of the model.

        entropy: asks for the entropy [T] (nats) of each whole distribution, from the same pass; it has no gradient.
        positions_N: int64, ascending, the only tokens that figures are needed of; those of the others are 0.
        """
        if positions_N is None:
            return self._log_probs(targets_T, None, temperature, entropy)
        found = self._log_probs(targets_T[positions_N], positions_N, temperature, entropy)

        def spread(values_N: torch.Tensor) -> torch.Tensor:
            return values_N.new_zeros(targets_T.shape).index_copy(0, positions_N, values_N)

        spread_entropy = None if found.entropy is None else spread(found.entropy)
        return TokenLogProbs(spread(found.log_probs), spread_entropy, spread(found.first_choice))

    def _log_probs(
        self, targets_N: torch.Tensor, positions_N: torch.Tensor | None, temperature: float, entropy: bool
    ) -> TokenLogProbs:
        """Figures [N] of the targets of the tokens at these positions, None for all."""
        model, weight_VH = self.model, self._weight
        start, vocab = self._words
        shard = VocabShard(start, vocab, model.groups.tensor, model.config.sequence_parallel)
        if model.fused_log_probs:
            return linear_token_log_probs(
                self._hidden_PH,
                weight_VH,
                targets_N,
                temperature=temperature,
                shard=shard,
                positions=positions_N,
                entropy=entropy,
                memory_budget=model.log_prob_memory,
                into_main_grad=hasattr(weight_VH, "main_grad"),
            )
        found = token_log_probs(
            self.logits(positions_N),
            targets_N,
            temperature=temperature,
            vocab_start=start,
            vocab=vocab,
            group=model.groups.tensor,
            entropy=entropy,
        )
        return replace(found, entropy=None if found.entropy is None else found.entropy.detach())

    def values(self) -> torch.Tensor:
        """The value head's V [T] (fp32), on every tensor rank."""
        values_P = self.model.gpt_chunks[-1].value_head(self.hidden_PH)
        if self.model.config.sequence_parallel:
            # Every tensor rank goes on to the same loss: the gradient of a rank's own stretch is a slice, not a sum.
            values_P = gather_from_sequence_parallel_region(
                values_P, tensor_parallel_output_grad=False, group=self.model.groups.tensor
            )
        return values_P[: self.num_tokens]

    def logits(self, positions_N: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [T, V] in the model's dtype, or [N, V] of the tokens at `positions_N` (int64) alone."""
        gpt = self.model.gpt_chunks[-1]
        if positions_N is None:
            logits_P1V, _ = gpt.output_layer(self._hidden_PH[:, None], weight=self._weight)
            whole_TV: torch.Tensor = logits_P1V[: self.num_tokens, 0]
            return whole_TV
        spread = (
            gather_from_sequence_parallel_region
            if self.model.config.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        hidden_PH = spread(self._hidden_PH, group=self.model.groups.tensor)
        return F.linear(hidden_PH[positions_N], self._weight)

    @property
    def _weight(self) -> torch.Tensor:
        return output_weight(self.model.gpt_chunks[-1])

    @property
    def _words(self) -> tuple[int, int]:
        """The first token of this tensor rank's rows, and how many of them are tokens, the rest padding."""
        width = len(self._weight)
        start = self.model.groups.tensor.rank() * width
        return start, min(max(self.model.vocab - start, 0), width)

    @property
    def _hidden_PH(self) -> torch.Tensor:
        # megatron-core's wrapper for bf16 hands the last stage's output on in fp32.
        return self.hidden_PH.to(self._weight.dtype)


def output_weight(gpt: GPTModel) -> torch.Tensor:
    """The output layer's rows on this rank of the last stage, [V, H]."""
    shared = gpt.share_embeddings_and_output_weights
    weight_VH: torch.Tensor = gpt.shared_embedding_or_output_weight() if shared else gpt.output_layer.weight
    return weight_VH
