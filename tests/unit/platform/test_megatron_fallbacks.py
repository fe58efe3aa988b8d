"""The gradient norm and clip that megatron-core calls where it has neither Transformer Engine nor Apex."""

import pytest
import torch

from gspo_moe.platform import megatron_fallbacks, use_torch_kernels


@pytest.fixture
def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3,), (5, 7), (2, 3, 4))]


def test_they_take_the_place_of_megatrons() -> None:
    from megatron.core.optimizer import clip_grads

    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    use_torch_kernels([adam])
    assert clip_grads.l2_norm_impl is megatron_fallbacks._l2_norm
    assert clip_grads.multi_tensor_scale_impl is megatron_fallbacks._scale
    assert adam.param_groups[0]["fused"]
    assert not adam.param_groups[0]["foreach"]


def test_the_norm_is_that_of_all_tensors_together(gradients: list[torch.Tensor]) -> None:
    norm, per_tensor = megatron_fallbacks._l2_norm(0, None, [gradients], False)
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert per_tensor is None
    assert norm.shape == (1,)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_scaling_writes_the_second_list(gradients: list[torch.Tensor], in_place: bool) -> None:
    expected = [gradient * 0.3 for gradient in gradients]
    before = [gradient.clone() for gradient in gradients]
    target = gradients if in_place else [torch.empty_like(gradient) for gradient in gradients]
    megatron_fallbacks._scale(0, None, [gradients, target], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(target, expected, strict=True))
    assert in_place or all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))
