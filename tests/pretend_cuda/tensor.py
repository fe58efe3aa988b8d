"""The tensor that says it is on cuda:0, and its operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretend_cuda.waits import launches, wait

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Operations that CUDA's versions take a CPU tensor of values or indices in.
MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_"}
# Operations whose result's size, or value, the host must know.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "is_nonzero"}
# Ops of this project that have an autograd formula but no Python dispatch: their own function runs as it is.
COMPOSED = {"token_log_probs", "linear_token_log_probs", "linear_token_backward_"}
SAME_IN_BOTH = {"data_ptr", "untyped_storage", "storage", "_typed_storage", "__repr__"}
ANSWERS: dict[str, Any] = {"is_pinned": False, "is_shared": False, "get_device": 0}


def on_cuda(device: Any) -> bool:
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


class CudaTensor(torch.Tensor):
    """`held` is the data on the CPU. To C++ it is a CPU tensor too, so that autograd takes it without a GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CudaTensor:
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
            requires_grad=False,
        )
        made.held = inner
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait("pickle")
        return _unpickled, (self.held.detach().clone(), self.requires_grad)

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        return _unpickled(self.held.clone(), self.requires_grad)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        torch.autograd.backward(self, *args, **kwargs)

    def record_stream(self, stream: Any) -> None:
        """In Python, since C++ would refuse a stream that is none."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        me: Any = args[0] if args else None
        if name in ("__get__", "__set__"):
            known, answer = _attribute(name, getattr(getattr(func, "__self__", None), "__name__", ""), args)
            if known:
                return answer
        if name in ANSWERS:
            return ANSWERS[name]
        if name in SAME_IN_BOTH:
            return getattr(me.held, name)()
        if name == "type" and len(args) == 1 and not kwargs:
            return me.held.type().replace("torch.", "torch.cuda.", 1)
        if name == "cuda":
            return me
        if name in ("cpu", "tolist"):
            wait(name)
            return to_cpu(me) if name == "cpu" else me.held.tolist()
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if name == "to" or name.startswith("new_"):
            return moved(func, name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if name == "rms_norm" and not torch.is_grad_enabled():  # one kernel on a GPU, several on the CPU
                launches[name] += 1
                plain, options = tree_map(_held, (args, kwargs))
                return CudaTensor(func(*plain, **options))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        flat, _ = tree_flatten((args, kwargs))
        mine = [one for one in flat if isinstance(one, CudaTensor)]
        _refuse_mixing(func, name, flat)
        if func.namespace == "gspo_moe" and name in COMPOSED:
            with torch.no_grad():
                return OPDEFS[f"gspo_moe::{name}"]._init_fn(*args, **kwargs)
        _note_wait(name, args, kwargs)
        if not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):  # no view
            launches[name] += 1
        plain = tree_map(_held, (args, kwargs))
        out = _on_the_cpu(func, name, *plain)
        back = {id(one.held): one for one in mine}

        def wrapped(one: Any) -> Any:
            if not isinstance(one, torch.Tensor) or isinstance(one, CudaTensor):
                return one
            return back[id(one)] if id(one) in back else CudaTensor(one)

        return tree_map(wrapped, out)


def _attribute(name: str, attribute: str, args: Any) -> tuple[bool, Any]:
    """Whether the getter or setter of an attribute has an answer of its own here, and the answer."""
    me = args[0]
    if name == "__set__":
        if attribute != "data":
            return False, None
        if not isinstance(args[1], CudaTensor):
            raise RuntimeError("the .data of a tensor on cuda:0 is set to a CPU tensor")
        me.held = args[1].held
        return True, None
    if attribute == "data":
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            return True, me.detach()
    answers = {"device": CUDA, "is_cuda": True, "is_cpu": False}
    return attribute in answers, answers.get(attribute)


def _refuse_mixing(func: Any, name: str, flat: list[Any]) -> None:
    others = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, CudaTensor)]
    sizes = [tuple(one.shape) for one in others if one.dim() > 0 and one.numel() > 0]
    if sizes and name not in MAY_MIX:
        raise RuntimeError(f"{func} mixes tensors on cuda:0 and cpu; those on cpu have the sizes {sizes}")


def _note_wait(name: str, args: Any, kwargs: Any) -> None:
    if name == "_local_scalar_dense":
        wait("item")
    elif name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        wait(name)
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [one for one in args[1] if isinstance(one, torch.Tensor)]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            wait(f"{name} by mask")
        if not all(isinstance(one, CudaTensor) for one in indices):
            wait(f"{name} by cpu tensor")
    elif name == "copy_" and type(args[0]) is not type(args[1]) and not (len(args) > 2 and args[2]):
        wait("copy_ to cuda" if isinstance(args[0], CudaTensor) else "copy_ to cpu")


def _on_the_cpu(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    kwargs = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
    if name == "addmm" and "out_dtype" in str(func._schema):  # which the CPU has no kernel for
        total, left, right = args[:3]
        return kwargs["out"].copy_(total + torch.mm(left.float(), right.float()))
    with contextlib.nullcontext() if torch.is_inference_mode_enabled() else torch.no_grad():
        return func(*args, **kwargs)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, CudaTensor) else one


def _unpickled(inner: torch.Tensor, requires_grad: bool) -> CudaTensor:
    made = CudaTensor(inner)
    made.requires_grad_(requires_grad)
    return made


class _ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        return tensor.held.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return CudaTensor(grads[0])


class _ToCUDA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        return CudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].held


def to_cpu(tensor: Any) -> Any:
    if tensor.requires_grad and torch.is_grad_enabled():
        return _ToCPU.apply(tensor)
    return tensor.held.detach().clone()


def to_cuda(tensor: Any) -> Any:
    if isinstance(tensor, CudaTensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _ToCUDA.apply(tensor)
    return CudaTensor(tensor.detach().clone())


def moved(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`tensor.to(...)` and `tensor.new_*(...)`, where the result may lie elsewhere than the tensor."""
    me, *rest = args
    device = kwargs.pop("device", None)
    if name == "new_tensor":
        made = torch.tensor(rest[0], dtype=kwargs.get("dtype") or me.dtype)
        if device is not None and not on_cuda(device):
            return made
        wait("new_tensor")
        return CudaTensor(made)
    if name.startswith("new_"):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return out if device is None or on_cuda(device) else to_cpu(out)
    if rest and isinstance(rest[0], str | torch.device | int) and not isinstance(rest[0], bool):
        device = rest.pop(0)
        rest = rest[1:] if rest and rest[0] is None else rest
    elif rest and isinstance(rest[0], torch.Tensor):
        device, rest[0] = CUDA if isinstance(rest[0], CudaTensor) else CPU, rest[0].dtype
    if device is not None and on_cuda(device) and not isinstance(me, CudaTensor):
        if not (kwargs.get("non_blocking") and me.is_pinned()):
            wait("to cuda")
        me = to_cuda(me)
    elif device is not None and not on_cuda(device) and isinstance(me, CudaTensor):
        if not kwargs.get("non_blocking"):  # which goes to pinned memory; whoever reads it waits for a stream
            wait("to cpu")
        me = to_cpu(me)
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.to(me, *rest, **kwargs) if rest or kwargs else me
