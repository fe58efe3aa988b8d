"""token_log_probs on the CPU against its float64 definition, for every instruction set that this processor has."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from gspo_moe.errors import KernelError
from gspo_moe.kernels import kernels, ops, reference, token_log_probs
from gspo_moe.kernels.tokens import _token_log_probs
from tests.unit.kernels.cuda import on_torch
from tests.unit.kernels.cuda.cases import fuzz, grid

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the widths of a vector (4, 8, 16), of four of them (64) and of a block (4096), and the empty and single column.
COLUMNS = (0, 1, 3, 5, 15, 16, 17, 63, 64, 65, 131, 4095, 4096, 4097, 8200, 12289)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if kernels().cpu is None:
        pytest.skip(kernels().missing)
    monkeypatch.setenv("GSPO_MOE_CPU", request.param)
    try:
        ops.token_stats(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1.0, 0, 1, False)
    except RuntimeError:
        pytest.skip(f"no {request.param} on this processor")
    return str(request.param)


def drawn(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(tokens, columns, generator=generator)).to(dtype)
    return logits, torch.randint(-2, columns + 3, (tokens,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_gradients_are_those_of_the_definition(instructions: str, dtype: torch.dtype) -> None:
    for columns, padding, entropy in itertools.product(COLUMNS, (0, 3), (False, True)):
        logits, targets = drawn(5, columns + padding, dtype, seed=columns)
        numbers = (1 / 0.7, 40, columns)
        targets += 40
        found = ops.token_stats(logits, targets, numbers[0], numbers[1], numbers[2], entropy)
        expected = reference.token_stats(logits, targets, *numbers, entropy)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=2e-6)

        generator = torch.Generator().manual_seed(columns)
        grad, grad_entropy = torch.randn(2, 5, generator=generator).unbind()
        grad[1] = grad_entropy[1] = 0.0
        log_z = (found[:, 0] + found[:, 1].log()).nan_to_num(0.0, 0.0, 0.0)
        rest = (grad_entropy, torch.rand(5, generator=generator)) if entropy else (None, None)
        arguments = (logits, targets, log_z, grad, rest[0], rest[1], *numbers)
        expected = reference.token_gradient(*arguments)
        ops.token_backward_(*arguments)
        torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=ROUNDING[dtype])
        assert (logits[:, columns:] == 0).all()
        assert (logits[1] == 0).all()


def test_rows_may_lie_apart_and_start_anywhere(instructions: str) -> None:
    whole, targets = drawn(6, 90, torch.bfloat16)
    logits, before = whole[1:5, 3:80], whole.clone()
    expected = reference.token_stats(logits, targets[1:5], 1.0, 0, 77, True)
    torch.testing.assert_close(
        ops.token_stats(logits, targets[1:5], 1.0, 0, 77, True).double(), expected, atol=1e-5, rtol=2e-6
    )
    ops.token_backward_(logits, targets[1:5], torch.full((4,), 20.0), torch.ones(4), None, None, 1.0, 0, 77)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:5, 3:80] = False
    assert torch.equal(whole[outside], before[outside])


def test_extreme_and_masked_logits(instructions: str) -> None:
    inf, nan = torch.inf, torch.nan
    rows = {
        "large": [3e4, 3e4 - 2, -3e4, 0.0],
        "masked": [-inf, 1.0, torch.finfo(torch.float32).min, 2.0],
        "all_masked": [-inf] * 4,
        "nan": [nan, 1.0, 2.0, 3.0],
        "infinite": [inf, 1.0, 2.0, 3.0],
    }
    logits = torch.tensor(list(rows.values())).repeat(1, 9)
    targets = torch.ones(len(rows), dtype=torch.int64)
    found = ops.token_stats(logits, targets, 1.0, 0, 36, True).double()
    expected = reference.token_stats(logits, targets, 1.0, 0, 36, True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert found[2, [0, 1, 3]].tolist() == [-inf, 0.0, 0.0]
    log_z = found[:, 0].float() + found[:, 1].float().log()
    ops.token_backward_(logits, targets, log_z, torch.ones(len(rows)), None, None, 1.0, 0, 36)
    assert (logits[1, ::4] == 0).all()
    assert (logits[1, 2::4] == 0).all()
    assert logits[3].isnan().all()


def test_a_row_gives_the_same_bits_in_any_company(instructions: str) -> None:
    logits, targets = drawn(37, 5000, torch.float32)
    together = ops.token_stats(logits, targets, 1.3, 0, 5000, True)
    apart = [ops.token_stats(logits[i : i + 1], targets[i : i + 1], 1.3, 0, 5000, True) for i in range(37)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_values_entropy_and_gradient_are_those_of_log_softmax(dtype: torch.dtype) -> None:
    logits, _ = drawn(17, 61, dtype)
    targets = torch.arange(17) * 3 % 58
    weights = torch.randn(2, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact[:, :58] / 0.7, dim=1)
    expected, expected_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)
    ((expected * weights[0]).sum() + (expected_entropy * weights[1]).sum()).backward()
    leaf = logits.requires_grad_()
    found = token_log_probs(leaf, targets + 9, temperature=0.7, vocab_start=9, vocab=58, entropy=True)
    assert found.entropy is not None
    ((found.log_probs * weights[0]).sum() + (found.entropy * weights[1]).sum()).backward()
    error = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.log_probs.double(), expected, atol=error, rtol=error)
    torch.testing.assert_close(found.entropy.double(), expected_entropy, atol=error, rtol=error)
    assert torch.equal(found.first_choice, logits[:, :58].argmax(dim=1) == targets)
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=error, rtol=ROUNDING.get(dtype, 1e-12))


def test_logits_become_their_gradient_unless_they_are_a_leafs_or_kept() -> None:
    leaf, targets = torch.randn(4, 9).requires_grad_(), torch.arange(4)
    for logits, keep, in_place in (
        (leaf * 1, False, True),
        (leaf * 1, True, False),
        (leaf, False, False),
        (leaf[:], False, False),
        ((leaf * 1)[:, :7], False, True),
    ):
        values = logits.detach().clone()
        (gradient,) = torch.autograd.grad(token_log_probs(logits, targets, keep_logits=keep).log_probs.sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) == in_place
        assert torch.equal(logits.detach(), values) != in_place
    assert torch.equal(leaf, leaf.detach().clone())


def test_logits_that_something_else_changed_or_saved_raise() -> None:
    leaf, targets = torch.randn(4, 9).requires_grad_(), torch.arange(4)
    logits = leaf * 1
    found = token_log_probs(logits, targets).log_probs
    logits.add_(1.0)
    with pytest.raises(KernelError, match="keep_logits=True"):
        found.sum().backward()
    logits = leaf * 1
    found = token_log_probs(logits, targets).log_probs
    found.sum().backward(retain_graph=True)
    with pytest.raises(KernelError, match="keep_logits=True"):
        found.sum().backward()
    upstream = torch.tanh(leaf)  # keeps its own output for its backward
    with pytest.raises(RuntimeError, match="inplace"):
        token_log_probs(upstream, targets).log_probs.sum().backward()
    leaf.grad = None
    upstream = torch.tanh(leaf)
    token_log_probs(upstream, targets, keep_logits=True).log_probs.sum().backward()
    exact = leaf.detach().double().requires_grad_()
    torch.log_softmax(exact.tanh(), dim=1)[torch.arange(4), targets].sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-6, rtol=1e-6)


def test_a_second_derivative_is_refused() -> None:
    leaf = torch.randn(4, 9).requires_grad_()
    with pytest.raises(KernelError, match="second derivative"):
        token_log_probs(leaf, torch.arange(4)).log_probs.sum().backward(create_graph=True)


def test_columns_apart_and_shared_rows_are_copied_first() -> None:
    leaf, targets = torch.randn(9, 4).requires_grad_(), torch.arange(4)
    for logits in (leaf.T, leaf[0, :3].expand(4, 3) * 1, leaf[0, :3].expand(4, 3)):
        found = token_log_probs(logits, targets % 3)
        expected = torch.log_softmax(logits.detach().double(), dim=1)[torch.arange(4), targets % 3]
        torch.testing.assert_close(found.log_probs.double(), expected, atol=1e-6, rtol=1e-6)
        values = leaf.detach().clone()
        found.log_probs.sum().backward()
        assert torch.equal(leaf.detach(), values)


def test_wrong_arguments_say_what_fits() -> None:
    logits, targets = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for arguments, options, message in (
        ((logits[None], targets), {}, "two dimensions"),
        ((logits, targets.int()), {}, r"targets must be int64 \[3\]"),
        ((logits, targets[:2]), {}, r"targets must be int64 \[3\]"),
        ((logits, targets), {"temperature": 0.0}, "temperature=0.0"),
        ((logits, targets), {"vocab": 6}, "vocab=6"),
    ):
        with pytest.raises(KernelError, match=message):
            token_log_probs(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_keep_torchs_rules(dtype: torch.dtype) -> None:
    logits, targets = drawn(4, 30, dtype)
    figures = torch.rand(3, 4).unbind()
    numbers = (1.3, 0, 28)
    opcheck(ops._token_stats, (logits, targets, *numbers, True))
    opcheck(ops._token_backward_, (logits, targets, *figures[:2], None, None, *numbers))
    opcheck(ops._token_backward_, (logits, targets, *figures[:2], *figures[1:], *numbers))
    for entropy in (False, True):
        opcheck(_token_log_probs, (logits.clone().requires_grad_(), targets, *numbers, entropy, True, ""))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_products_are_added_in_float32(instructions: str, dtype: torch.dtype) -> None:
    for columns in COLUMNS:
        part, _ = drawn(3, columns, dtype, seed=columns)
        total = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
        expected = total + part.float()
        ops.accumulate_(total, part)
        assert torch.equal(total, expected)
    opcheck(ops._accumulate_, (total, part))
    apart = torch.zeros(4, 6)[:, ::2]
    ops.accumulate_(apart, part[:2, :6].reshape(4, 3))
    assert torch.equal(apart, part[:2, :6].reshape(4, 3).float())


def test_the_grid_of_the_cuda_kernels(instructions: str) -> None:
    for case in [*grid(), *fuzz(seed=0, count=40)]:
        if instructions == "generic" and case.kernel == "token_backward":
            continue  # the grid's bounds are those of fused multiply-add, which the generic build may lack
        on_torch.run(case, "cpu")
