"""For people and tests: what the table of kernels says, and how to name the kernel that computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..checks import checked
from ..errors import TargetingError, did_you_mean
from .choice import NAMED, TABLE, choose
from .products import Product

__all__ = ["explain", "using"]


@checked(TargetingError)
def explain(product: Product | None = None) -> str:
    """The table as text: each kernel and why it stands there; of a product, what each lacks for it, and the choice."""
    lines = []
    for kernel in TABLE.values():
        lacks = None if product is None else kernel.lacks(product)
        lines.append(f"{kernel.name}: {kernel.why}" + (f"\n  not here: {lacks}" if lacks else ""))
    return "\n".join(lines if product is None else [*lines, f"chosen: {choose(product).name}"])


@contextmanager
@checked(TargetingError)
def using(kernel: str) -> Iterator[None]:
    """Within this, every product is computed by one kernel: `with using("exact"):` for the reference.

    Raises:
        TargetingError: no kernel has this name.
    """
    if kernel not in TABLE:
        raise TargetingError(f"there is no kernel {kernel!r}.{did_you_mean(kernel, TABLE)}")
    token = NAMED.set(kernel)
    try:
        yield
    finally:
        NAMED.reset(token)
