"""What every observer is: a module that returns its input unchanged, remembers what it saw, and answers with qparams.

`ObserverBase` is the interface that the engine knows. `RangeObserverBase` decides, for all observers of a range, which
values carry none: NaN is an error, masks and overflows are left out. `UniformQuantizationObserverBase` adds checked
constructor arguments, the qparams of a range, errors that say where the data came from, and checkpoints of the
reference API. Names of attributes, buffers and state-dict keys are those of
torch.ao.quantization.observer.

Before this: `qparams` does the arithmetic. After it: one file per way of keeping a range.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import CalibrationError, CalibrationWarning, SpecError
from ..qparams import FLOAT32_EPS, affine_qparams, float_qparams, min_max, symmetric_zero_point
from ..specs import FLOAT8, PER_CHANNEL, PER_TENSOR, integer_range, is_symmetric
from .factory import PartialWrapper

__all__ = ["ObserverBase", "UniformQuantizationObserverBase", "keeping_types"]


FLOAT32_MAX: float = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).smallest_normal  # of smaller numbers the reciprocal is infinite

_NO_ARGUMENTS = ("training", "site")


class ObserverBase(ABC, nn.Module):
    """A module that watches one tensor, and every tensor that shares its qparams.

    Args:
        dtype: type that the tensor will be quantized to.
        is_dynamic: qparams are computed at run time; the observer only carries the configuration.

    `site` says what is being observed, for error messages; the engine sets it to the text of `locate(node)`.
    """

    site: str = ""

    facts: ClassVar[tuple[str, ...]] = ()
    """State that depends on the data alone: it serves any observer with the same facts, whatever its arguments."""

    _peers: Callable[[Any, Tensor], None] | None = None
    """Watches in the place of this observer, with those of other processes; `pt2e_quant.distributed` sets it."""

    @checked(SpecError)
    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.is_dynamic = is_dynamic

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Watch x and return it, the same object. A tensor on the meta device has no values to watch."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) for what was seen."""

    def counted(self) -> tuple[Tensor, Tensor] | None:
        """Values that were seen, ascending, and how often each; both 1-d, on the CPU. None where nothing is counted.

        A value stands for its bin; the first and the last are the smallest and the largest that were seen.
        """
        return None

    @property
    def has_data(self) -> bool:
        """False while calibration data is still missing; observers that need none are always True."""
        return True

    def merge(self, other: ObserverBase) -> None:
        """Take in what `other` saw, as if this observer had seen it. `other` stays as it is.

        Exact, and independent of order, for ranges and for the counts of DistributionObserver; what a moving average
        or the compatible histogram can do is written there.

        Raises:
            CalibrationError: `other` is of another class, or was made with other arguments.
        """
        if type(self) is not type(other) or self._signature() != other._signature():
            raise CalibrationError(
                f"{self._where}: a {self!r} cannot take in what a {other!r} saw. Merge observers of one class, "
                "made with the same arguments."
            )
        self._merge(other)

    def __call__(self, x: Tensor) -> Tensor:
        if self._peers is None:
            return super().__call__(x)  # type: ignore[no-any-return]
        self._peers(self, x)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ObserverBase:
        return super()._apply(keeping_types(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _merge(self, other: Any) -> None:
        """Take in what `other`, known to fit, saw. Observers that keep nothing have nothing to do."""

    def _absorb(self, batch: Any) -> None:
        """Take in one batch, which is all that `batch`, known to fit, saw."""
        self._merge(batch)

    def _signature(self) -> dict[str, Any]:
        """Everything that the constructor was told, which is what is neither state nor location."""
        return {name: value for name, value in vars(self).items() if name[0] != "_" and name not in _NO_ARGUMENTS}

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialWrapper:
        """A recipe for observers of this class with these constructor arguments."""
        return PartialWrapper(partial(cls, **kwargs))

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> PartialWrapper:
        """A recipe whose arguments are made by calling these functions each time an observer is made."""
        return PartialWrapper(partial(cls), kwargs)

    @property
    def _where(self) -> str:
        return self.site or f"a {type(self).__name__} outside of any graph"


def keeping_types(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` does to a tensor, but for a change of its type: ranges and scales stay in float32."""

    def kept(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        return made if made.dtype is tensor.dtype else tensor.to(made.device)

    return kept


class RangeObserverBase(ObserverBase):
    """What observers of a range share: values that carry no range, and bounds of q."""

    _warned_of_masks = False

    def _usable(self, x: Tensor) -> tuple[Tensor, float, float] | None:
        """x without masks (see `_masked`), detached, with its smallest and largest value; None when nothing is left."""
        values = x.detach()
        low, high = (end.item() for end in min_max(values))
        if not self._within(low, high, values):
            values = values[~self._masked(values)]
            if not values.numel():
                return None
            low, high = (end.item() for end in min_max(values))
        return values, low, high

    @staticmethod
    def _within(low: float, high: float, x: Tensor) -> bool:
        """True when no value of x is a mask or NaN; False for NaN, since it compares to nothing."""
        limit = largest(x.dtype)
        return low > -limit and high < limit

    def _masked(self, x: Tensor) -> Tensor:
        """Where x holds no number that anybody computed: infinity, or the largest number of its type, of either sign.

        Attention masks are made of these and overflows end there. They carry no range: they are left out with one
        warning per observer, and saturate in the quantized model. NaN has no place on any grid and is an error.

        Raises:
            CalibrationError: x holds NaN. Nothing of x has been recorded.
        """
        masked = ~(x.abs() < largest(x.dtype))
        missing, found = int(x.isnan().sum()), int(masked.sum())
        if missing:
            raise CalibrationError(
                f"{self._where}: {missing} NaN among {x.numel()} values in calibration. None of this batch was "
                "recorded.\n  Run the float model on the same batch: if its inputs are clean, a division by 0, log(0), "
                "or infinity minus infinity made them. Drop the batch, or leave this place in float."
            )
        if not self._warned_of_masks:
            self._warned_of_masks = True
            rest = x[~masked]
            kept = f"the others lie in [{rest.min():g}, {rest.max():g}]" if rest.numel() else "there are no others"
            warnings.warn(
                CalibrationWarning(
                    f"{self._where}: {found} of {x.numel()} values in calibration are infinite or the largest number "
                    f"of {x.dtype}, as in an attention mask; {kept}. They are left out of the range here and in later "
                    "batches, and will saturate. If they are no mask, the float model overflows here."
                ),
                stacklevel=2,
            )
        return masked

    def _no_data(self) -> str:
        return (
            f"{self._where}: the {type(self).__name__} saw no data, so it has no range.\n"
            "  Run at least one batch of calibration data through the prepared model before converting it. If no "
            "input reaches this place (a branch that is never taken), leave it in float."
        )

    def _integer_bounds(self, quant_min: int | None, quant_max: int | None) -> tuple[int, int]:
        name = type(self).__name__
        low, high = whole = self._dtype_bounds()
        low, high = low if quant_min is None else quant_min, high if quant_max is None else quant_max
        if not whole[0] <= low < high <= whole[1]:
            raise SpecError(f"{name}: [{low}, {high}] is not a range of {self.dtype}, which holds {list(whole)}")
        if not low <= 0 <= high:
            raise SpecError(f"{name}: the range of q must contain 0, got [{low}, {high}]; real zero has no place in it")
        return low, high

    def _dtype_bounds(self) -> tuple[int, int]:
        if self.dtype in FLOAT8:
            limits = torch.finfo(self.dtype)
            return int(limits.min), int(limits.max)
        whole = integer_range(self.dtype)
        if whole is None or whole[1] - whole[0] >= 1 << 32:
            raise SpecError(
                f"{type(self).__name__}: a range cannot be mapped onto {self.dtype}; use an integer type of at most 32 "
                "bits, such as torch.int8, or PlaceholderObserver for a cast to float16"
            )
        return whole


class UniformQuantizationObserverBase(RangeObserverBase):
    """Base of the observers that keep a range and map it onto integers in equal steps.

    Args:
        dtype: an integer type of at most 32 bits (torch.int8 or torch.qint8 alike), or an 8-bit float.
        qscheme: a torch.per_tensor_* or torch.per_channel_* scheme; None is the default of the class.
        reduce_range: halve the integer range (7 bits); for x86 kernels without VNNI, whose sums overflow 16 bits.
        quant_min, quant_max: bounds of q, both included, around 0; None is the bound of dtype.
        factory_kwargs: `device` and `dtype` of the buffers.
        eps: smallest scale.
        is_dynamic: as in ObserverBase.

    Raises:
        SpecError: an argument is illegal, or two contradict each other.
    """

    # As in the reference: 2 made eps a buffer; 3 renamed min_vals and max_vals, and made the histogram's ends scalars.
    _version = 3

    schemes: ClassVar[tuple[torch.qscheme, ...]] = PER_TENSOR + PER_CHANNEL
    """The schemes that this class can keep a range for; the first one is its default."""

    eps: Tensor

    @checked(SpecError)
    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = FLOAT32_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.qscheme = self.schemes[0] if qscheme is None else qscheme
        self.reduce_range = reduce_range
        self.has_customized_qrange = quant_min is not None or quant_max is not None
        self._check_scheme()
        low, high = self._integer_bounds(quant_min, quant_max)
        self.quant_min, self.quant_max = (low // 2, high // 2) if reduce_range else (low, high)
        if not _SMALLEST <= eps <= FLOAT32_MAX:
            raise SpecError(
                f"{type(self).__name__}: eps is the smallest scale and must be finite and > 0 in float32, got {eps}"
            )
        self.register_buffer("eps", torch.tensor([float(eps)], **self._factory(factory_kwargs)))

    def reset_min_max_vals(self) -> None:
        """Forget everything that was seen."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to forget its range")

    def _calculate_qparams(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """qparams of a range under this observer's scheme; always with at least one dimension."""
        bounds = self.quant_min, self.quant_max
        eps: Any = self.eps
        if not torch.compiler.is_compiling():  # which cannot look at values
            if is_unset(min_val, max_val):
                raise CalibrationError(self._no_data())
            eps = float(eps)
        try:
            if self.qscheme is torch.per_channel_affine_float_qparams:
                scale, zero_point = float_qparams(min_val, max_val, *bounds, eps=eps)
            else:
                middle, symmetric = self._symmetric_zero_point(), is_symmetric(self.qscheme)
                scale, zero_point = affine_qparams(
                    min_val, max_val, *bounds, dtype=self.dtype, symmetric=symmetric, eps=eps, zero_point=middle
                )
        except CalibrationError as error:
            raise CalibrationError(f"{self._where}: {error}") from error
        return torch.atleast_1d(scale), torch.atleast_1d(zero_point)

    def _symmetric_zero_point(self) -> int:
        """As the reference: the middle of an 8-bit unsigned range is rounded down once the user gave any bounds."""
        if self.has_customized_qrange and integer_range(self.dtype) == (0, 255):
            return (self.quant_min + self.quant_max) // 2
        return symmetric_zero_point(self.quant_min, self.quant_max, self.dtype)

    def _factory(self, factory_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """Arguments for making buffers.

        Raises:
            SpecError: they make none.
        """
        try:
            arguments: dict[str, Any] = nn.factory_kwargs(factory_kwargs)
            torch.empty(0, **arguments)
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
            raise SpecError(
                f"{type(self).__name__}: factory_kwargs={factory_kwargs} make no tensor: {error}"
            ) from error
        return arguments

    # --- what the constructor checks ----------------------------------------------------------------------------------

    def _check_scheme(self) -> None:
        name = type(self).__name__
        if self.qscheme not in self.schemes:
            allowed = ", ".join(map(str, self.schemes))
            raise SpecError(f"{name}: qscheme {self.qscheme!r} does not describe what it keeps; pass one of {allowed}")
        if self.reduce_range and is_symmetric(self.qscheme) and self.dtype is torch.quint8:
            raise SpecError(
                f"{name}: the range of torch.quint8 cannot be reduced in a symmetric scheme; use torch.qint8"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        if version is None or version < 2:  # eps was a plain attribute then
            state_dict.setdefault(prefix + "eps", torch.tensor([FLOAT32_EPS]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def largest(dtype: torch.dtype) -> float:
    """Magnitude from which on a value is a mask: the largest number of its type, or of float32, where ranges live."""
    return min(torch.finfo(dtype).max, FLOAT32_MAX) if dtype.is_floating_point else FLOAT32_MAX


def is_unset(min_val: Tensor, max_val: Tensor) -> bool:
    """True for the ends of a range before any data: no elements, or [inf, -inf]."""
    return min_val.numel() == 0 or bool((min_val > max_val).all())


def widen(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> None:
    """Make [low, high] hold [other_low, other_high], in place."""
    torch.minimum(low, other_low.to(low), out=low)
    torch.maximum(high, other_high.to(high), out=high)


def move_range(low: Tensor, high: Tensor, seen_low: Tensor, seen_high: Tensor, constant: float) -> None:
    """end += constant * (seen - end) for both ends, rounded like the reference in each step; torch.lerp is not.

    Coming from 1e38, these steps round a small new end to 0, so that a range of one sign can end up inside out, which
    the reference keeps. The range seen stands there instead.
    """
    for end, seen in ((low, seen_low), (high, seen_high)):
        end.add_((seen.to(end.device) - end).mul_(constant))
    inside_out = low > high
    if bool(inside_out.any()):
        low.copy_(torch.where(inside_out, seen_low.to(low), low))
        high.copy_(torch.where(inside_out, seen_high.to(high), high))


def checked_constant(averaging_constant: float) -> float:
    if not 0.0 < averaging_constant <= 1.0:
        raise SpecError(f"averaging_constant is the weight of a new batch, in (0, 1], got {averaging_constant}")
    return averaging_constant


def revive_scalar(state_dict: dict[str, Any], key: str, empty: float) -> None:
    """Early versions kept an unset end as a tensor without elements; today it is infinite and a scalar."""
    if key in state_dict and state_dict[key].numel() == 0:
        state_dict[key] = torch.tensor(empty)
