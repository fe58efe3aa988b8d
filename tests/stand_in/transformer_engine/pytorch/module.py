from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Module(torch.nn.Module):
    """What every module of Transformer Engine has: state of its own for FP8, empty without it."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert state.numel() == 0

    def _weight(
        self, name: str, rows: int, columns: int, init: Callable[[torch.Tensor], Any] | None, dtype: Any, device: Any
    ) -> None:
        weight = torch.nn.Parameter(torch.full((rows, columns), torch.nan, dtype=dtype, device=device))
        assert init is not None
        init(weight)
        weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.register_parameter(name, weight)


class Linear(_Module):
    weight: torch.nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        assert tp_size == 1
        assert not bias
        assert not fuse_wgrad_accumulation
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self._weight("weight", out_features, in_features, init_method, params_dtype, device)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        assert inp.dtype == self.weight.dtype, "Data types for parameters must match when outside of autocasted region"
        return torch.nn.functional.linear(inp, self.weight)


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1
        assert not bias
        assert not fuse_wgrad_accumulation
        self.num_gemms, self.use_bias = num_gemms, bias
        for number in range(num_gemms):
            self._weight(f"weight{number}", out_features, in_features, init_method, params_dtype, device)

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        assert isinstance(m_splits, list)
        assert len(m_splits) == self.num_gemms
        parts = inp.view(-1, inp.shape[-1]).split(m_splits)
        return torch.cat([part @ getattr(self, f"weight{number}").T for number, part in enumerate(parts)])


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        assert (normalized_shape is None) != (hidden_size is None)
        assert not zero_centered_gamma
        super().__init__(normalized_shape or hidden_size or 0, eps=eps, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
