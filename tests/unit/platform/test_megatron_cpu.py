"""Each answer of `ANSWERS`, given to a module below megatron.core and to no other."""

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_moe.errors import ConfigError
from gspo_moe.platform import check_megatron_version, prepare_megatron
from tests.qwen3 import layout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU megatron-core runs as it is")

# What megatron-core does with CUDA, in one module.
ASKS = """
import torch

KINDS = ("torch.cuda.FloatTensor", ("torch.cuda.BFloat16Tensor", "cuda"))

def zeros(device="cuda"):
    def inner():
        return torch.zeros(2, device="cuda")
    return [inner(), torch.zeros(2, device=device), torch.zeros(2, device=torch.cuda.current_device())]

def kind_is_known(tensor):
    return tensor.type() in {"torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"}

def unrelated():
    return "cuda:0", "Torch.cuda.FloatTensor", "torch.cuda.Stream"

def streams():
    side, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.cuda.device(0):
        torch.cuda.nvtx.range_push("range")
        result = torch.ones(3).sum()
        torch.cuda.nvtx.range_pop()
    event.record(side)
    torch.cuda.default_stream().wait_event(side.record_event(event))
    torch.cuda.synchronize()
    return result, event.query()

def all_to_all(tensor, splits, group):
    output = torch.empty_like(tensor)
    torch.distributed.all_to_all_single(output, tensor, splits, splits, group=group)
    return output
"""


@pytest.fixture(autouse=True)
def prepared() -> None:
    prepare_megatron()


@pytest.fixture
def asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The module `ASKS`, once below megatron.core (`inside`) and once elsewhere (`outside`)."""
    import megatron.core

    (tmp_path / "asks_for_cuda.py").write_text(ASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(megatron.core, "__path__", [*megatron.core.__path__, str(tmp_path)])
    names = ("megatron.core.asks_for_cuda", "asks_for_cuda")
    inside, outside = (importlib.import_module(name) for name in names)
    yield SimpleNamespace(inside=inside, outside=outside, file=tmp_path / "asks_for_cuda.py")
    for name in names:
        del sys.modules[name]


def on_cpu(tensors: list[torch.Tensor]) -> bool:
    return all(tensor.device == torch.device("cpu") and torch.equal(tensor, torch.zeros(2)) for tensor in tensors)


def test_device_names_in_code_defaults_and_current_device_mean_the_cpu(asks: SimpleNamespace) -> None:
    assert on_cpu(asks.inside.zeros())
    assert asks.inside.zeros.__defaults__ == ("cpu",)


def test_names_of_cuda_tensor_types_mean_the_cpus_types(asks: SimpleNamespace) -> None:
    assert asks.inside.kind_is_known(torch.zeros(1))
    assert asks.inside.kind_is_known(torch.zeros(1, dtype=torch.bfloat16))
    assert not asks.inside.kind_is_known(torch.zeros(1, dtype=torch.float64))
    assert asks.inside.KINDS == ("torch.FloatTensor", ("torch.BFloat16Tensor", "cpu"))


def test_other_constants_stay(asks: SimpleNamespace) -> None:
    assert asks.inside.unrelated() == asks.outside.unrelated()


def test_streams_and_events_keep_the_order_that_a_cpu_has_anyway(asks: SimpleNamespace) -> None:
    result, happened = asks.inside.streams()
    assert result == 3
    assert happened


def test_random_states_of_the_device_are_a_generators_of_their_own(asks: SimpleNamespace) -> None:
    cuda = asks.inside.torch.cuda
    before = torch.get_rng_state()
    cuda.manual_seed(3)
    three = cuda.get_rng_state()
    cuda.manual_seed(4)
    assert not torch.equal(cuda.get_rng_state(), three)
    cuda.set_rng_state(three)
    assert torch.equal(cuda.get_rng_state(), three)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rng_tracker_forks_and_comes_back() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, _get_cuda_rng_state, _set_cuda_rng_state

    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 7)
    outer = _get_cuda_rng_state().clone()
    with tracker.fork("experts"):
        assert not torch.equal(_get_cuda_rng_state(), outer)
        _set_cuda_rng_state(torch.Generator().manual_seed(9).get_state())
    assert torch.equal(_get_cuda_rng_state(), outer)
    assert torch.equal(tracker.get_states()["experts"], torch.Generator().manual_seed(9).get_state())


def test_all_to_all_takes_split_sizes_as_tensors(asks: SimpleNamespace) -> None:
    from gspo_moe.parallel.groups import initialize, shut_down

    groups = initialize(layout(), seed=1)
    try:
        tensor, splits = torch.arange(5.0), torch.tensor([5])
        assert torch.equal(asks.inside.all_to_all(tensor, splits, groups.expert), tensor)
        with pytest.raises(TypeError):
            asks.outside.all_to_all(tensor, splits, groups.expert)
    finally:
        shut_down()


def test_fusions_leave_functions_as_they_are() -> None:
    from megatron.core import jit

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert jit.jit_fuser(doubled) is doubled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_router_computes_in_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 1, 8, generator=generator, dtype=torch.bfloat16)
    weight = torch.randn(4, 8, generator=generator, dtype=torch.bfloat16).requires_grad_()
    logits = router_gating_linear(tokens, weight, None, dtype)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), tokens.double() @ weight.double().T, atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert weight.grad is not None
    expected = tokens.double().sum(dim=(0, 1)).expand(4, 8)
    torch.testing.assert_close(weight.grad.double(), expected, atol=1e-2, rtol=1e-2)


def test_moving_a_tensor_to_the_gpu_leaves_it() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor


def test_other_modules_still_have_no_gpu(asks: SimpleNamespace) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        asks.outside.zeros()
    assert not asks.outside.kind_is_known(torch.zeros(1))
    assert asks.outside.torch is torch
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


def test_torch_itself_keeps_its_functions() -> None:
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.Stream.__module__ == "torch.cuda.streams"
    assert torch.cuda.get_rng_state.__module__ == "torch.cuda.random"
    for name in ("all_to_all_single", "all_gather", "reduce_scatter"):
        assert getattr(torch.distributed, name) is getattr(torch.distributed.distributed_c10d, name)
    from torch.optim import adam

    assert adam.torch is torch


def test_compiled_files_on_disk_stay_megatrons_own(asks: SimpleNamespace) -> None:
    code = importlib.machinery.SourceFileLoader("again", str(asks.file)).get_code("again")
    assert "cuda" in all_constants(code)
    assert "cpu" not in all_constants(code)


def all_constants(value: Any) -> set[Any]:
    if isinstance(value, CodeType):
        return set().union(*(all_constants(constant) for constant in value.co_consts))
    if isinstance(value, tuple):
        return set().union(*(all_constants(item) for item in value))
    return {value}


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2", "0.17.0rc1", "0.19.2", "0.19.2+local"])
def test_tried_versions_are_taken(version: str) -> None:
    check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.12.0", "0.16.0", "0.16.1rc0", "0.20", "0.20.0rc1", "0.20.0", "1.0.0"])
def test_untried_versions_are_refused_with_the_fix(version: str) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'megatron-core>=0\.16\.1,<0\.20'") as caught:
        check_megatron_version(version)
    assert f"megatron-core {version} was not tried" in str(caught.value)


def test_an_absent_megatron_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"megatron-core is not installed; run: bash launch/install\.sh"):
        prepare_megatron()


def without_our_finder() -> list[Any]:
    return [finder for finder in sys.meta_path if type(finder).__module__ != "gspo_moe.platform.megatron_cpu"]


def test_it_is_put_in_once() -> None:
    before = list(sys.meta_path)
    assert prepare_megatron()
    assert sys.meta_path == before
    assert len(without_our_finder()) == len(before) - 1


def test_a_megatron_imported_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", without_our_finder())
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    with pytest.raises(ConfigError, match=r"put `import gspo_moe\.model` above its first import"):
        prepare_megatron()


def test_a_machine_with_a_gpu_keeps_megatron_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", without_our_finder())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not prepare_megatron()
    assert sys.meta_path == without_our_finder()
