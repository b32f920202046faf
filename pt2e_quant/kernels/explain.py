"""For people and tests: what the table of kernels says, and how to name the kernel that computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..checks import checked
from ..errors import TargetingError, did_you_mean
from .choice import TABLE, choose
from .kernel import NAMED, Kernel
from .products import Product
from .recurrent import RECURRENT, RecurrentKernel

__all__ = ["explain", "using"]


@checked(TargetingError)
def explain(product: Product | None = None) -> str:
    """The table as text: each kernel and why it stands there; of a product, what each lacks for it, and the choice."""
    if product is None:
        known: list[Kernel | RecurrentKernel] = [*TABLE.values(), *RECURRENT.values()]
        return "\n".join(f"{kernel.name}: {kernel.why}" for kernel in known)
    lines = []
    for kernel in TABLE.values():
        lacks = kernel.lacks(product) or kernel.loses(product)
        lines.append(f"{kernel.name}: {kernel.why}" + (f"\n  not here: {lacks}" if lacks else ""))
    return "\n".join([*lines, f"chosen: {choose(product).name}"])


@contextmanager
@checked(TargetingError)
def using(kernel: str) -> Iterator[None]:
    """Within this, every product is computed by one kernel: `with using("exact"):` for the reference.

    Recurrent layers run as a loop over such products, or by the kernel of theirs that is named.

    Raises:
        TargetingError: no kernel has this name.
    """
    known = [*TABLE, *RECURRENT]
    if kernel not in known:
        raise TargetingError(f"there is no kernel {kernel!r}.{did_you_mean(kernel, known)}")
    token = NAMED.set(kernel)
    try:
        yield
    finally:
        NAMED.reset(token)
