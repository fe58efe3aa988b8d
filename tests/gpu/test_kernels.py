"""The CUDA kernels on a GPU, against the float64 references of their grid. Shape letters: T tokens, V vocabulary."""

import pytest
import torch

from gspo_moe.kernels import kernels, ops, reference
from tests.unit.kernels.cuda import on_torch
from tests.unit.kernels.cuda.cases import fuzz, grid


@pytest.fixture(autouse=True)
def _needs_cuda_kernels() -> None:
    if not kernels().cuda:
        pytest.skip(kernels().missing)


def test_the_grid() -> None:
    for case in [*grid(), *fuzz(seed=0, count=40)]:
        on_torch.run(case, "cuda")


def random_rows(tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    logits_TV = torch.randn((tokens, vocab), dtype=torch.bfloat16, device="cuda", generator=generator)
    return logits_TV, torch.randint(vocab, (tokens,), device="cuda", generator=generator)


def test_rows_beyond_two_to_the_31_elements() -> None:
    logits_TV, targets_T = random_rows(15_000, 151_936)
    assert logits_TV.numel() > 2**31
    last = slice(-3, None)
    stats_TS = ops.token_stats(logits_TV, targets_T, 1.0, 0, 151_936, False)
    wanted_TS = reference.token_stats(logits_TV[last], targets_T[last], 1.0, 0, 151_936, False)
    torch.testing.assert_close(stats_TS[last].double(), wanted_TS, rtol=1e-5, atol=0)
    log_z_T = stats_TS[:, 0] + stats_TS[:, 1].log()
    ones_T = torch.ones_like(log_z_T)
    wanted_TV = reference.token_gradient(
        logits_TV[last], targets_T[last], log_z_T[last], ones_T[last], None, None, 1.0, 0, 151_936
    )
    ops.token_backward_(logits_TV, targets_T, log_z_T, ones_T, None, None, 1.0, 0, 151_936)
    torch.testing.assert_close(logits_TV[last].double(), wanted_TV, rtol=2**-8, atol=1e-7)


def test_kernels_run_on_the_current_stream() -> None:
    """Behind a slow kernel on a side stream; on any other stream they would see the logits before it fills them."""
    filled_TV, targets_T = random_rows(300, 5000)
    wanted_TS = reference.token_stats(filled_TV, targets_T, 1.0, 0, 5000, False)
    logits_TV = torch.zeros_like(filled_TV)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        logits_TV.copy_(filled_TV)
        stats_TS = ops.token_stats(logits_TV, targets_T, 1.0, 0, 5000, False)
    side.synchronize()
    torch.testing.assert_close(stats_TS.double(), wanted_TS, rtol=1e-5, atol=1e-6)


def test_equal_inputs_give_equal_bits() -> None:
    logits_TV, targets_T = random_rows(2000, 10_000)
    lengths = torch.randint(0, 200, (500,), device="cuda")
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    new_T, old_T = torch.randn((2, int(bounds[-1])), device="cuda") * 1e-3
    mask_T = torch.rand(len(new_T), device="cuda") < 0.8
    advantages_N = torch.randn(500, dtype=torch.float64, device="cuda")

    def everything() -> list[torch.Tensor]:
        stats_TS = ops.token_stats(logits_TV, targets_T, 1.0, 0, 10_000, True)
        reduced = ops.sequence_reduce(new_T, old_T, mask_T, bounds, advantages_N, False, None, 3e-4, 4e-4, 1.0)
        return [stats_TS, *reduced]

    for first, second in zip(everything(), everything(), strict=True):
        assert torch.equal(first, second)
