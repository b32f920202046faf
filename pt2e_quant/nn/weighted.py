"""What quantized linears and convolutions have in common, and nn.quantized.Linear.

Their parameters are a quantized weight and a float bias under the reference's state-dict keys. The keys decide which
layout a state dict has; versions can be lost.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizedTensorError
from ..kernels import Geometry, Post, Product, Weight
from ..qtensor import QTensor, from_torch, quantize_per_tensor
from ..qtensor.tensor import door
from .observed import activation_grid, as_quantized, folded, quantize_weight, weight_observer
from .rows import POSTS, ROWS, Row
from .scripting import Unscripted
from .stored import linear_of

__all__ = ["Linear", "LinearPackedParams", "Quantized", "WeightedModule", "moved", "prepared", "rounded_to_half"]


class Quantized(Unscripted, nn.Module):
    """A module whose output has a grid of its own, kept as two numbers.

    scale, zero_point: a number each; in state dicts tensors without dimensions.
    """

    scale: float
    zero_point: int

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.tensor(self.scale)
        destination[prefix + "zero_point"] = torch.tensor(self.zero_point)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing = rest[2]
        for name, kind in (("scale", float), ("zero_point", int)):
            if prefix + name in state_dict:
                setattr(self, name, kind(state_dict.pop(prefix + name)))
            else:
                missing.append(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class WeightedModule(Quantized):
    """A product with a quantized weight. Subclasses say their row, how they are built and where the weight is kept."""

    row: ClassVar[Row]
    post: Post
    """What follows the product: of the row, unless a class says more."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "row" in vars(cls) and "post" not in vars(cls):
            cls.post = POSTS[cls.row.post]

    def _get_name(self) -> str:
        return f"Quantized{self.row.shown}"

    @property
    def product(self) -> Weight:
        """The weight as kernels take it."""
        raise NotImplementedError

    def set_weight_bias(self, w: Tensor, b: Tensor | None) -> None:
        """Take another weight (a QTensor, or torch's own) and bias."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The quantized weight."""
        return self.product.quantized

    def bias(self) -> Tensor | None:
        """The bias in float32, or None."""
        return self.product.bias

    def _weight_bias(self) -> tuple[Tensor, Tensor | None]:
        return self.weight(), self.bias()

    def forward(self, input: Tensor) -> Tensor:
        """A QTensor in, a QTensor on the grid (scale, zero_point) out."""
        x = as_quantized(input, self)
        return Product.compute(self.product, self.post, x, self.scale, self.zero_point)

    @classmethod
    def empty_like(cls, module: Any) -> WeightedModule:
        """One with the sizes of a float module, and no weight yet."""
        raise NotImplementedError

    @classmethod
    @door
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> WeightedModule:
        """The quantized form of a float (or fused, or trained) module that prepare has given observers.

        Args:
            mod: with `qconfig` (or `weight_fake_quant`) and, for a static form, `activation_post_process`.
            use_precomputed_fake_quant: do not show the weight to its observer again.

        Raises:
            QuantizedTensorError: something of that is missing.
        """
        inner = mod[0] if isinstance(mod, nn.Sequential) else mod
        made = cls.empty_like(inner)
        weight, bias = folded(inner)
        observer = weight_observer(mod, inner, cls._default_observer())
        made._take_float(weight, bias, observer, watch=not use_precomputed_fake_quant)
        if cls._is_static():
            made.scale, made.zero_point = activation_grid(mod)
        return made

    @classmethod
    @door
    def from_reference(cls, ref: Any, output_scale: float = 1.0, output_zero_point: int = 0) -> WeightedModule:
        """The quantized form of a reference module.

        Args:
            ref: of nn.quantized.reference.
            output_scale, output_zero_point: the grid of the result; a dynamic form has none.
        """
        made = cls.empty_like(ref)
        made.set_weight_bias(ref.get_quantized_weight(), ref.bias)
        made.scale, made.zero_point = float(output_scale), int(output_zero_point)
        return made

    def _take_float(self, weight: Tensor, bias: Tensor | None, observer: Any, watch: bool) -> None:
        self.set_weight_bias(quantize_weight(weight, observer, watch=watch), bias)

    @classmethod
    def _is_static(cls) -> bool:
        return True

    @classmethod
    def _default_observer(cls) -> Any:
        return None


def prepared(w: Tensor, b: Tensor | None, geometry: Geometry | None = None) -> Weight:
    """A weight as a user, or a checkpoint, gives it."""
    if not isinstance(w, QTensor):
        w = from_torch(w)
    if not isinstance(w, QTensor):
        raise QuantizedTensorError(
            f"set_weight_bias takes a quantized weight, got a tensor of {w.dtype}; quantize it first"
        )
    return Weight(w, None if b is None else b.detach(), geometry)


def moved(weight: Weight, fn: Any) -> Weight:
    """A weight on the device that `fn` moves tensors to; `half()` and the like change nothing in it."""
    codes = fn(weight.quantized.codes)
    if codes.device == weight.quantized.codes.device:
        return weight
    bias = None if weight.bias is None else weight.bias.to(codes.device)
    return Weight(weight.quantized.to(codes.device), bias, weight.geometry)  # type: ignore[arg-type]


def rounded_to_half(weight: Tensor) -> Tensor:
    """A float weight as float16 holds it, what is out of its range at the end of that, in float32."""
    limit = torch.finfo(torch.float16).max
    return weight.clamp(-limit, limit).half().float()


class LinearPackedParams(Unscripted, nn.Module):
    """Weight and bias of a linear: a module of its own, since state dicts of the reference have it.

    dtype: torch.qint8, or torch.float16 for a dynamic linear that only rounds its weight.
    """

    _version = 3

    @door
    def __init__(self, dtype: torch.dtype = torch.qint8) -> None:
        super().__init__()
        if dtype not in (torch.qint8, torch.float16):
            raise QuantizedTensorError(f"the weight of a quantized linear is torch.qint8 or torch.float16, not {dtype}")
        self.dtype = dtype
        one = torch.zeros(1, 1)
        self.set_weight_bias(quantize_per_tensor(one, 1.0, 0, torch.qint8) if dtype is torch.qint8 else one, None)

    def set_weight_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take another weight and bias."""
        self.float16: tuple[Tensor, Tensor | None] | None = None
        self.packed: Weight | None = None
        if self.dtype is torch.float16:
            self.float16 = weight.detach().float(), bias
        else:
            self.packed = prepared(weight, bias)

    def _weight_bias(self) -> tuple[Tensor, Tensor | None]:
        return self.float16 if self.float16 is not None else (self.packed.quantized, self.packed.bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: it holds parameters."""
        return x

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_packed_params" in vars(self):  # of the reference
            self.set_weight_bias(*linear_of(vars(self).pop("_packed_params")))

    def _apply(self, fn: Any, recurse: bool = True) -> LinearPackedParams:
        if self.packed is not None:
            self.packed = moved(self.packed, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "dtype"] = self.dtype
        destination[prefix + "_packed_params"] = self._weight_bias()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        self.dtype = state_dict.pop(prefix + "dtype", torch.qint8)  # version 1 has none
        if prefix + "_packed_params" in state_dict:  # version 3
            self.set_weight_bias(*state_dict.pop(prefix + "_packed_params"))
        elif prefix + "weight" in state_dict:  # versions 1 and 2
            self.set_weight_bias(state_dict.pop(prefix + "weight"), state_dict.pop(prefix + "bias", None))
        else:
            missing.append(prefix + "_packed_params")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)


class Linear(WeightedModule):
    """y = x @ weight.T + bias on QTensors.

    Args:
        in_features, out_features: sizes of the last dimension.
        bias_: whether there is a bias.
        dtype: torch.qint8.

    Shapes: (*, in_features) -> (*, out_features).
    """

    row = ROWS["Linear"]
    _version = row.version
    in_features: int
    out_features: int

    @door
    def __init__(
        self, in_features: int, out_features: int, bias_: bool = True, dtype: torch.dtype = torch.qint8
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.zero_point = 1.0, 0
        self._packed_params = LinearPackedParams(dtype)
        weight = torch.zeros(out_features, in_features, dtype=torch.int8 if dtype is torch.qint8 else torch.float32)
        weight = QTensor(weight, 1.0, 0) if dtype is torch.qint8 else weight
        self.set_weight_bias(weight, torch.zeros(out_features) if bias_ else None)

    @property
    def product(self) -> Weight:
        return self._packed_params.packed  # type: ignore[return-value]

    @door
    def set_weight_bias(self, w: Tensor, b: Tensor | None) -> None:
        self._packed_params.set_weight_bias(w, b)

    def weight(self) -> Tensor:
        return self._packed_params._weight_bias()[0]

    def bias(self) -> Tensor | None:
        return self._packed_params._weight_bias()[1]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, scale={self.scale}, zero_point={self.zero_point}, qscheme={self.product.quantized.qscheme()}"

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    @classmethod
    def empty_like(cls, module: Any) -> Linear:
        return cls(module.in_features, module.out_features, module.bias is not None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):  # version 1 has them here
            if prefix + name in state_dict:
                state_dict[f"{prefix}_packed_params.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)
