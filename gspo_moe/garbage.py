"""Python's collector of cyclic garbage, kept from going over what nobody will ever free. Standard library only.

It goes over all objects each time that they have grown by a quarter: a dozen times while torch and megatron-core are
imported, and at every save, as plans of a checkpoint are thousands of objects beside the million that the imports left.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected inside, where cyclic garbage is little and memory is of no concern."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """For the imports of a program: as `uncollected`, and no later collection goes over what is there at the end."""
    with uncollected():
        yield
        gc.freeze()
