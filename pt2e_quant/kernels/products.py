"""Linear, convolution and transposed convolution: a weight that is prepared once, and the kernel that its table names.

A kernel returns codes of a grid, or real numbers where the next layer wants those (dynamic quantization, and functions
after the product that no kernel fuses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import QuantizedTensorError
from ..grid import Grid
from ..qtensor import quantize_per_tensor_dynamic
from ..qtensor.tensor import NAMES, QTensor, is_traced, wrap
from ..requantization import bias_codes
from .choice import choose
from .kernel import NAMED, Codes, Dynamic

__all__ = ["Geometry", "Post", "Product", "Weight"]

_LIMITS = {stored: (torch.iinfo(stored).min, torch.iinfo(stored).max) for stored in NAMES}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input: tuples with one number for each spatial dimension, and groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Post:
    """What follows a product before it is rounded: a name, and the function on real numbers; relu also fuses."""

    name: str = "none"
    function: Callable[[Tensor], Tensor] | None = None


@dataclass(eq=False)
class Weight:
    """An int8 weight with its bias in float32, and what kernels derive from them, made when first needed.

    quantized: (out, in) of a linear, (out, in / groups, ...) of a convolution, (in, out / groups, ...) of a transposed
        one; one scale in all, or one for each output channel.
    bias: (out,), or None.
    geometry: None for a linear.
    exported: the weight with scales in float32, the type that backends read in graphs.
    """

    quantized: QTensor
    bias: Tensor | None = None
    geometry: Geometry | None = None
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)
    exported: QTensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        q = self.quantized
        if q.stored_as is not torch.qint8 or (q.axis is not None and q.axis != self.output_axis):
            raise QuantizedTensorError(
                f"a weight has int8 codes and one scale in all, or one for each index of dimension {self.output_axis} "
                f"(its outputs); got {q.stored_as} with axis {q.axis}"
            )
        scale = q.scale.float() if isinstance(q.scale, Tensor) else q.scale
        self.exported = wrap(q.codes, scale, q.zero_point, q.axis, q.stored_as)  # now, since later it would be traced

    @property
    def output_axis(self) -> int:
        return 1 if self.geometry is not None and self.geometry.transposed else 0

    @property
    def spatial(self) -> int:
        return self.quantized.dim() - 2

    @cached_property
    def scale(self) -> Tensor:
        """float64, of one element or of one for each output."""
        scale = torch.as_tensor(self.quantized.scale, dtype=torch.float64, device=self.quantized.device).flatten()
        groups = self.geometry.groups if self.geometry is not None and self.geometry.transposed else 1
        return scale.repeat(groups) if scale.numel() > 1 else scale.reshape(())

    @cached_property
    def centred(self) -> Tensor:
        """Code - zero point, int64."""
        q = self.quantized
        shape = [-1 if dim == q.axis else 1 for dim in range(q.dim())]
        zero_point = torch.as_tensor(q.zero_point, device=q.device).long()
        return q.codes.long() - (zero_point if q.axis is None else zero_point.reshape(shape))

    @cached_property
    def is_symmetric(self) -> bool:
        return not bool(torch.as_tensor(self.quantized.zero_point).any())

    @cached_property
    def largest_sum(self) -> int:
        """The largest sum of |code - zero point| that meets one output."""
        others = [dim for dim in range(self.centred.dim()) if dim != self.output_axis]
        return int(self.centred.abs().sum(others).max()) if self.centred.numel() else 0

    def codes_of_bias(self, x_scale: float) -> Tensor | None:
        """The bias in int32, with scale s_x * s_w."""
        return None if self.bias is None else bias_codes(self.bias.detach(), x_scale, self.scale)

    def __getstate__(self) -> dict[str, Any]:
        """What kernels derived stays behind in copies and files: it belongs to a machine."""
        return {"quantized": self.quantized, "bias": self.bias, "geometry": self.geometry, "derived": {}}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept for the same key; of one kind (the first of the key), the last one is kept."""
        held = self.derived.get(key[0])
        if held is None or held[0] != key:
            held = self.derived[key[0]] = (key, make())
        return held[1]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operator, on tensors of one floating-point type."""
        g = self.geometry
        if g is None:
            return F.linear(x, weight, bias)
        if g.transposed:
            op = _TRANSPOSED[self.spatial]
            return op(x, weight, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
        return _CONV[self.spatial](x, weight, bias, g.stride, g.padding, g.dilation, g.groups)

    def along_channels(self, values: Tensor) -> Tensor:
        """Numbers per output in the shape of a result without batch: (out, 1, 1) for a 2-D convolution."""
        return values.reshape(-1, *[1] * self.spatial) if self.geometry is not None and values.numel() > 1 else values


@dataclass(frozen=True, eq=False)
class Product:
    """What calls that are alike have in common.

    weight, post: see there.
    shape, stored, device: of the operand's codes.
    scale, zero_point: the operand's grid. Kernels for real numbers get those of each call.
    out: the grid of the result; None for real numbers.
    dynamic: the operand comes as real numbers.
    """

    weight: Weight
    post: Post
    shape: torch.Size
    stored: torch.dtype
    device: torch.device
    scale: float
    zero_point: int
    out: Grid | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        g, sizes = self.weight.geometry, self.weight.quantized.shape
        wanted = sizes[0] if g is not None and g.transposed else sizes[1] * (1 if g is None else g.groups)
        dim, counted = (-1, "features in the last") if g is None else (1, "channels in the second")
        if len(self.shape) < max(dim + 1, 1) or self.shape[dim] != wanted:
            raise QuantizedTensorError(
                f"a weight of {tuple(sizes)} takes {wanted} {counted} dimension, got an input of shape "
                f"{tuple(self.shape)}"
            )

    @classmethod
    def of(cls, weight: Weight, post: Post, x: QTensor, out: Grid | None = None) -> Product:
        """The product of an operand, and of all that are like it."""
        codes, (scale, zero_point) = x.codes, (x.scale, x.zero_point)
        if not is_traced():
            scale, zero_point = float(scale), int(zero_point)
        return cls(weight, post, codes.shape, codes.dtype, codes.device, scale, zero_point, out)  # type: ignore[arg-type]

    @staticmethod
    def compute(
        weight: Weight, post: Post, x: QTensor, scale: float, zero_point: int, stored: torch.dtype | None = None
    ) -> QTensor:
        """Codes of the grid (scale, zero_point), in the integer type of x unless another is named."""
        codes = x.codes
        stored = stored or codes.dtype

        def make() -> Codes:
            return Product.of(weight, post, x, Grid(scale, zero_point, *_LIMITS[stored], stored)).for_codes()

        if is_traced():
            return wrap(make()(codes), scale, zero_point, None, NAMES[stored])
        grids = x.scale, x.zero_point, scale, zero_point, stored
        run = weight.once(("for codes", post, codes.shape, codes.dtype, codes.device, *grids, *_switches()), make)
        return wrap(run(codes), scale, zero_point, None, NAMES[stored])

    @staticmethod
    def compute_real(weight: Weight, post: Post, x: QTensor) -> Tensor:
        """Real numbers in float32."""
        values = choose(product := Product.of(weight, post, x)).real(product)(
            x.codes, product.scale, product.zero_point
        )
        return values if post.function is None else post.function(values)

    @staticmethod
    def compute_dynamic(weight: Weight, post: Post, x: Tensor, *, reduce_range: bool = False) -> Tensor:
        """Real numbers of real numbers, in their type; they are quantized with the scale that their own range asks for.

        Args:
            reduce_range: leave one of their 8 bits unused.

        Raises:
            CalibrationError: x is not finite.
        """
        if is_traced():
            quantized = quantize_per_tensor_dynamic(x.float(), torch.quint8, reduce_range)
            values = Product.compute_real(weight, post, quantized)
            return values if x.dtype is torch.float32 else values.to(x.dtype)
        alike = ("dynamic", post, x.shape, x.dtype, x.device, *_switches())
        run: Dynamic = weight.once(alike, lambda: _dynamic(weight, post, x))
        return run(x, reduce_range)

    def for_codes(self) -> Codes:
        """What computes codes for all calls like this one."""
        if self.post.name in ("none", "relu"):
            return choose(self).codes(self)
        plain = replace(self, out=None)
        real, function = choose(plain).real(plain), self.post.function or (lambda values: values)
        return lambda x: self.grid.quantize(function(real(x, self.scale, self.zero_point)))

    @property
    def grid(self) -> Grid:
        """The grid of the result, where it has one."""
        return self.out  # type: ignore[return-value]

    @property
    def lowest(self) -> int:
        """The lowest code of the result."""
        return max(self.grid.zero_point, self.grid.quant_min) if self.post.name == "relu" else self.grid.quant_min

    @property
    def rows(self) -> int:
        """How many times the weight is used."""
        return math.prod(self.shape[:-1])

    @cached_property
    def bound(self) -> int:
        """No sum is larger. With real numbers as result the zero point may be any, and the bias is added to those."""
        low, high = _LIMITS[self.stored]
        if self.out is None:
            return self.weight.largest_sum * (high - low)
        codes = self.weight.codes_of_bias(self.scale)
        reach = max(high, -low) + abs(self.zero_point)  # of code - zero point, and of sums that subtract it at the end
        return self.weight.largest_sum * reach + (0 if codes is None else int(codes.long().abs().max()))


def _dynamic(weight: Weight, post: Post, x: Tensor) -> Dynamic:
    """What computes `compute_dynamic` for all inputs like x."""
    product = Product(weight, post, x.shape, torch.uint8, x.device, 1.0, 0, dynamic=True)
    if x.numel():
        run = choose(product).for_dynamic(product)
    else:
        run = lambda x, _: weight.apply(x, weight.quantized.dequantize(), weight.bias)  # noqa: E731
    if x.dtype is torch.float32 and post.function is None:
        return run  # what most layers are pays for nothing more
    function = post.function or (lambda values: values)
    return lambda x, reduce_range: function(run(x.float(), reduce_range)).to(x.dtype)


def _switches() -> tuple[Any, ...]:
    """What a person can switch that decides on a kernel."""
    c = torch._C
    return NAMED.get(), c._get_qengine(), c._get_mkldnn_enabled(), c._get_float32_matmul_precision()
