"""One gloo device for all process groups of a process.

torch gives every gloo group a device of its own, whose thread wakes up a hundred times a second. megatron-core makes
some sixty groups a process, so that a few processes on one machine spent half their time waking up.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

from torch.distributed import distributed_c10d

_c10d: Any = distributed_c10d  # its stub lacks the overload with options
_devices: list[Any] = []  # of the first group, chosen by torch's own rules (GLOO_SOCKET_IFNAME, host name)


class _SharingGroup(_c10d.ProcessGroupGloo):
    """A gloo group on the devices of the first one."""

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        if not _devices:
            super().__init__(store, rank, size, timeout=timeout)
            _devices.extend(self.options._devices)
            return
        options = _c10d.ProcessGroupGloo._Options()
        options._devices, options._timeout = _devices, timeout
        super().__init__(store, rank, size, options)


@contextlib.contextmanager
def one_gloo_device() -> Iterator[None]:
    """Gloo groups that are made inside share the devices of the first, until `forget_gloo_device`."""
    before = _c10d.ProcessGroupGloo
    _c10d.ProcessGroupGloo = _SharingGroup
    try:
        yield
    finally:
        _c10d.ProcessGroupGloo = before


def forget_gloo_device() -> None:
    """Lets the devices end with the groups that use them."""
    _devices.clear()
