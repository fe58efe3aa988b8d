"""Log-probs over vocabulary slices on several ranks are those of one rank, in one collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from gspo_moe.kernels import TokenLogProbs, VocabShard, linear_token_log_probs, token_log_probs
from tests.launch import launch

# 37 words on columns for 40: padding on the last rank alone.
TOKENS, HIDDEN, COLUMNS, WORDS = 30, 8, 40, 37


def counted(function: Any, *arguments: Any, **options: Any) -> tuple[TokenLogProbs, int]:
    """What the function returns, and how many collectives it called."""
    calls: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(("all_", "reduce_", "broadcast", "gather", "scatter")):
                patch.setattr(dist, name, counting(name))
        return function(*arguments, **options), len(calls)


def check_ranks() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(ranks)))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS + 2, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(COLUMNS, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(WORDS, (TOKENS,), generator=generator)
    weights = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    exact_hidden, exact_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = exact_hidden[:TOKENS] @ exact_weight[:WORDS].T
    exact.retain_grad()
    log_p = torch.log_softmax(exact / 0.7, dim=1)
    expected, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)
    width = COLUMNS // ranks
    start = rank * width
    mine = slice(start, start + width)
    words = min(width, WORDS - start)

    ((expected * weights[0]).sum() + (entropy * weights[1]).sum()).backward(retain_graph=True)
    assert exact.grad is not None
    logits = torch.nn.functional.pad(exact.detach(), (0, COLUMNS - WORDS), value=9.0)[:, mine].float().requires_grad_()
    numbers: dict[str, Any] = {"temperature": 0.7, "vocab_start": start, "vocab": words, "group": group}
    found, collectives = counted(token_log_probs, logits, targets, entropy=True, **numbers)
    assert collectives == 1
    assert found.entropy is not None
    ((found.log_probs * weights[0]).sum() + (found.entropy * weights[1]).sum()).backward()
    torch.testing.assert_close(found.log_probs.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=1e-6)
    assert torch.equal(found.first_choice, exact.argmax(dim=1) == targets)
    assert logits.grad is not None
    gradient = torch.nn.functional.pad(exact.grad, (0, COLUMNS - WORDS))[:, mine]
    torch.testing.assert_close(logits.grad.double(), gradient, atol=1e-5, rtol=1e-6)
    tie = token_log_probs(torch.zeros(2, width), torch.tensor([3, WORDS - 1]), **numbers)
    assert tie.first_choice.all()
    copies = [torch.empty_like(found.log_probs) for _ in range(ranks)]
    dist.all_gather(copies, found.log_probs.detach())
    assert all(torch.equal(copies[0], copy) for copy in copies)

    exact_hidden.grad = exact_weight.grad = None
    (expected * weights[0]).sum().backward()
    assert exact_hidden.grad is not None
    assert exact_weight.grad is not None
    rows = slice(rank * len(hidden) // ranks, (rank + 1) * len(hidden) // ranks)
    cases = (False, 2**20, 0), (True, 1000, 0), (True, 2**20, 0), (False, 2**20, 2), (True, 1000, 2)
    for sequence_parallel, budget, shift in cases:  # shift: of the tokens, by that many that have no target
        whole, whole_grad = hidden.roll(shift, 0), exact_hidden.grad.roll(shift, 0)
        part = (whole[rows] if sequence_parallel else whole).float().requires_grad_()
        rows_of_weight = weight[mine].float().requires_grad_()
        found, collectives = counted(
            linear_token_log_probs,
            part,
            rows_of_weight,
            targets,
            temperature=0.7,
            shard=VocabShard(start, words, group, sequence_parallel),
            positions=torch.arange(TOKENS) + shift if shift else None,
            entropy=True,
            memory_budget=budget,
        )
        assert collectives == 1 + sequence_parallel
        (found.log_probs * weights[0]).sum().backward()
        torch.testing.assert_close(found.log_probs.double(), expected, atol=1e-5, rtol=1e-6)
        assert found.entropy is not None
        torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=1e-6)
        assert part.grad is not None
        assert rows_of_weight.grad is not None
        own = whole_grad[rows] if sequence_parallel else whole_grad
        torch.testing.assert_close(part.grad.double(), own, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(rows_of_weight.grad.double(), exact_weight.grad[mine], atol=1e-4, rtol=1e-5)
    dist.destroy_process_group()


def test_four_ranks_are_one() -> None:
    launch(check_ranks, 4)
