"""The hypothesis strategy for small exported models. Needs the extra `testing`; see `sketch` for what it draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..checks import checked
from ..errors import QuantizationError, SpecError
from .draft import Step
from .kinds import COMMON, OPS
from .sketch import STARTS, Sketch

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["MissingDependencyError", "aten_graphs"]


_OFTEN = 5  # of all steps, a little under half are of a common kind


class MissingDependencyError(QuantizationError, ImportError):
    """A package of the extra `testing` is not installed."""


@checked(SpecError)
def aten_graphs(
    *,
    max_steps: int = 8,
    ops: Iterable[str] | None = None,
    without: Iterable[str] = (),
    starts: Iterable[str] = tuple(STARTS),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    dynamic: bool = False,
    nested: bool = False,
) -> SearchStrategy[Sketch]:
    """Small float models: `drawn.exported` is the ExportedProgram, `drawn.inputs` and `drawn.batches(n)` its inputs.

    A failing example shrinks to few steps of simple ops, and prints as the code that makes it again.

        @given(aten_graphs())
        def test_my_quantizer_survives(sketch):
            prepared = prepare_pt2e(sketch.exported, MyQuantizer())
            prepared(*sketch.inputs)
            convert_pt2e(prepared)(*sketch.inputs)

    Args:
        max_steps: most steps of a model; a step is one op or a few.
        ops: names of the steps to draw from, of `pt2e_quant.testing.OPS`; all of them by default, almost half of
            the time one that backends have integer kernels for.
        without: names to leave out.
        starts: shapes of the input to draw from, of `pt2e_quant.testing.STARTS`.
        dtypes: floating-point types of the model to draw from.
        dynamic: some of the models have a free batch size.
        nested: some of the models take and return dictionaries with tuples in them.

    Raises:
        MissingDependencyError: hypothesis is not installed.
        QuantizationError: a name is unknown, or none is left.
    """
    st = _strategies()
    names = _chosen(OPS if ops is None else ops, set(without), OPS)
    small, newest = st.integers(0, 3), st.sampled_from((0, 0, 0, 1, 2, 3))
    often = [name for name in names if name in COMMON] * _OFTEN
    steps = st.builds(Step, st.sampled_from(names + often), newest, small, st.integers(0, 11))
    drawn: SearchStrategy[Sketch] = st.builds(
        Sketch,
        st.sampled_from(_chosen(starts, set(), STARTS)),
        st.lists(steps, min_size=1, max_size=max_steps).map(tuple),
        st.integers(0, 3),
        st.sampled_from(dtypes),
        st.booleans() if dynamic else st.just(False),
        st.booleans() if nested else st.just(False),
    )
    return drawn


def _strategies() -> ModuleType:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise MissingDependencyError(
            "aten_graphs() draws its models with hypothesis, which is not installed; "
            "run: pip install 'pt2e-quant[testing]'"
        ) from error
    return strategies


def _chosen(names: Iterable[str], without: set[str], known: Iterable[str]) -> list[str]:
    wanted = set(names)
    unknown = (wanted | without) - set(known)
    if unknown:
        raise QuantizationError(f"unknown: {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    chosen = [name for name in known if name in wanted - without]
    if not chosen:
        raise QuantizationError(f"nothing is left to draw from; there is {', '.join(known)}")
    return chosen
