import pytest
import torch

from gspo_moe.platform import Device, determinism, deterministic_algorithms


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("wanted", [True, False])
def test_torchs_deterministic_kernels_are_on_inside_and_only_on_gpus(
    kind: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "device", lambda: Device(kind, torch.device(kind), "none"))
    with deterministic_algorithms(wanted):
        assert torch.are_deterministic_algorithms_enabled() == (wanted and kind == "cuda")
        # Only warned of, attention's backward would stay as it is.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
