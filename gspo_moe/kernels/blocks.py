"""The logits of an output layer, a block of words at a time within a budget of memory.

Shape letters: T tokens, H hidden, V this rank's rows of the output weight, B of them in a block.
"""

from __future__ import annotations

import torch

from gspo_moe.kernels.ops import wide
from gspo_moe.kernels.products import onednn_mm, suits_onednn

MEMORY_BUDGET = 512 * 2**20
BLOCKS = 16  # of the budget: one being computed, the others kept
# What up to a quarter of the budget is spent on: on CUDA columns, as each block costs a pass over the hidden gradient;
# on the CPU bytes from which on glibc maps a result's memory, where freed smaller ones may fragment its heap.
WIDE = 16384
MAPPED = 2**25
EVEN = 64  # columns: products over odd numbers of them are up to a third slower


def block_columns(
    columns: int, logit_bytes: int, product_bytes: int, memory_budget: int, wide: int = 1
) -> tuple[int, int]:
    """Columns of logits a block, and columns of the first blocks that are kept for the backward, within the budget.

    logit_bytes: of a column's logits; product_bytes: of its row of the block's weight gradient, 0 where that goes
    straight to its place. wide: columns that a block should have. At least one, whatever the budget.
    """
    affordable = memory_budget // (logit_bytes + product_bytes)
    block = max(min(max(affordable // BLOCKS, min(affordable // 4, wide)), columns), 1)
    if block < columns:
        block = block // EVEN * EVEN or block
    for_logits = memory_budget - block * product_bytes
    if columns * logit_bytes <= for_logits:
        return block, columns
    return block, max(for_logits // logit_bytes - block, 0) // block * block


def product_bytes_of(weight_VH: torch.Tensor, into_main_grad: bool) -> int:
    """Bytes of a word's gradient before it is added to main_grad, see `add_product_`."""
    if not into_main_grad or weight_VH.dtype == wide(weight_VH.dtype) or weight_VH.is_cuda:
        return 0
    return weight_VH.shape[1] * weight_VH.element_size()


def wanted_columns(weight_VH: torch.Tensor, num_tokens: int) -> int:
    """Columns a block should have, see `block_columns`."""
    if weight_VH.is_cuda:
        return WIDE
    return MAPPED // (4 * max(num_tokens, 1)) + EVEN if weight_VH.dtype == torch.float32 else 1


class BlockLogits:
    """The logits [T, B] of one block after the other: the kept ones in their own memory, the others in one buffer.

    oneDNN's results come in new memory, so that a kept block is not its: a copy takes longer than it gains.
    """

    def __init__(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, kept: torch.Tensor, block: int) -> None:
        self._hidden_TH, self._weight_VH, self._kept = hidden_TH, weight_VH, kept
        self._num_tokens, self._num_kept = len(hidden_TH), kept.numel() // max(len(hidden_TH), 1)
        self.blocks = [slice(start, min(start + block, len(weight_VH))) for start in range(0, len(weight_VH), block)]
        self._onednn = suits_onednn(hidden_TH, weight_VH[:block].T)
        buffered = block if self._num_kept < len(weight_VH) and not self._onednn else 0
        self._buffer = kept.new_empty(self._num_tokens * buffered)

    def words(self, columns: slice, vocab_start: int, vocab: int) -> tuple[int, int]:
        """First token and number of tokens of a block, the rest of which is padding."""
        return vocab_start + columns.start, min(max(vocab - columns.start, 0), columns.stop - columns.start)

    def kept(self, columns: slice) -> bool:
        return columns.stop <= self._num_kept

    def place(self, columns: slice) -> torch.Tensor:
        width = columns.stop - columns.start
        start = columns.start * self._num_tokens if self.kept(columns) else 0
        memory = self._kept if self.kept(columns) else self._buffer
        return memory[start : start + width * self._num_tokens].view(self._num_tokens, width)

    def compute(self, columns: slice) -> torch.Tensor:
        factors = self._hidden_TH, self._weight_VH[columns].T
        if self._onednn and not self.kept(columns):
            return onednn_mm(*factors)
        return torch.mm(*factors, out=self.place(columns))
