"""nn.quantized.reference: float layers whose weights are rounded to a grid that they keep beside them.

What `convert` makes before a backend is chosen. Each is the class of torch.nn with buffers <weight>_scale,
<weight>_zero_point and <weight>_axis, and the scheme and type as attributes, for every weight that it rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QuantizedTensorError
from ..qtensor import QTensor, quantize_per_channel, quantize_per_tensor
from ..qtensor.tensor import door

__all__ = [
    "GRU",
    "LSTM",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "RNNCell",
    "ReferenceQuantizedModule",
]

_DEFAULT: dict[str, Any] = {"qscheme": torch.per_tensor_affine, "dtype": torch.quint8, "scale": 1.0, "zero_point": 0}
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)


class ReferenceQuantizedModule(nn.Module):
    """Weights with a grid each: what the reference classes share."""

    _IS_REFERENCE = True  # the reference's name: `from_float` takes the grid of the weight

    def _keep_grid(self, name: str, given: dict[str, Any] | None) -> None:
        """The grid of one weight.

        Args:
            name: of the parameter.
            given: qscheme, dtype, scale, zero_point, and axis for scales per channel; None for the reference's default.
        """
        given = _DEFAULT if given is None else given
        scheme = given["qscheme"]
        if scheme not in (None, torch.per_tensor_affine, *_PER_CHANNEL):
            raise QuantizedTensorError(
                f"{self._get_name()}: {name} has the scheme {scheme}; give the affine form of it"
            )
        setattr(self, f"{name}_qscheme", scheme)
        setattr(self, f"{name}_dtype", given["dtype"])
        whole = scheme is not None and not given["dtype"].is_floating_point
        scale, zero_point = (given["scale"], given["zero_point"]) if whole else (1.0, 0)
        zeros = zero_point if isinstance(zero_point, Tensor) else torch.tensor(zero_point, dtype=torch.int32)
        axis = given.get("axis", 0) if scheme in _PER_CHANNEL else 0
        self.register_buffer(f"{name}_scale", torch.as_tensor(scale, dtype=torch.float32).detach().clone())
        self.register_buffer(f"{name}_zero_point", zeros.detach().clone())
        self.register_buffer(f"{name}_axis", torch.tensor(int(axis), dtype=torch.int32))
        self._axes = {**getattr(self, "_axes", {}), name: int(axis)}  # as compilers cannot read buffers

    def _quantized(self, name: str) -> Tensor:
        """One weight on its grid: a QTensor, or float16, or the weight as it is."""
        weight, scheme, dtype = (getattr(self, name + end) for end in ("", "_qscheme", "_dtype"))
        if dtype is torch.float16:
            return weight.to(dtype)  # type: ignore[no-any-return]
        if scheme is None or dtype.is_floating_point:
            return weight  # type: ignore[no-any-return]
        scale, zero_point = getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero_point")
        if scheme in _PER_CHANNEL:
            return quantize_per_channel(weight.detach(), scale, zero_point, self._axes[name], dtype)
        made: Tensor = quantize_per_tensor(weight.detach(), scale, zero_point, dtype)
        return made

    def _rounded(self, name: str) -> Tensor:
        """The real numbers that one weight's codes stand for."""
        made = self._quantized(name)
        return made.dequantize() if isinstance(made, QTensor) else made.to(getattr(self, name).dtype)

    def get_weight(self) -> Tensor:
        """The weight, rounded to its grid, in float."""
        return self._rounded("weight")

    def get_quantized_weight(self) -> Tensor:
        """The weight as integers."""
        return self._quantized("weight")

    def _names(self) -> list[str]:
        return [name.removesuffix("_scale") for name in self._buffers if name.endswith("_scale")]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._named_in_files():
            destination[f"{prefix}{name}_qscheme"] = getattr(self, f"{name}_qscheme")
            destination[f"{prefix}{name}_dtype"] = getattr(self, f"{name}_dtype")

    def _named_in_files(self) -> list[str]:
        """Weights whose scheme and type a state dict holds: those of recurrent layers it does not, in the reference."""
        return [name for name in self._names() if name == "weight"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in self._names():
            for end in ("scale", "zero_point", "axis", "qscheme", "dtype"):
                if f"{prefix}{name}_{end}" in state_dict:  # set, not copied: a scale per channel has another shape
                    setattr(self, f"{name}_{end}", state_dict.pop(f"{prefix}{name}_{end}"))
            self._axes[name] = int(getattr(self, f"{name}_axis"))
        held = {name: self._buffers.pop(name) for name in list(self._buffers)}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._buffers.update(held)

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}(Reference)"


class _Weighted(ReferenceQuantizedModule):
    """A layer with one weight, which all arguments of the float class and `weight_qparams` make."""

    _KEPT: tuple[str, ...] = ()

    @door
    def __init__(self, *args: Any, weight_qparams: dict[str, Any] | None = None, **options: Any) -> None:
        if "bias_" in options:
            options["bias"] = options.pop("bias_")
        super().__init__(*args, **options)
        self._keep_grid("weight", weight_qparams)

    @classmethod
    @door
    def from_float(cls, mod: Any, weight_qparams: dict[str, Any]) -> Any:
        """The reference form of a float layer, with the grid of its weight (see `_keep_grid`)."""
        options = {name: getattr(mod, name) for name in cls._KEPT}
        if hasattr(mod, "bias"):
            options["bias"] = mod.bias is not None
        made = cls(**options, device="meta", weight_qparams=weight_qparams)  # without random weights
        made.weight = nn.Parameter(mod.weight.detach())
        if getattr(mod, "bias", None) is not None:
            made.bias = nn.Parameter(mod.bias.detach())
        return made


class Linear(_Weighted, nn.Linear):
    """torch.nn.Linear with a rounded weight."""

    _KEPT = ("in_features", "out_features")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_weight(), self.bias)


class _Convolution(_Weighted):
    _KEPT = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def forward(self: Any, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.get_weight(), self.bias)  # type: ignore[no-any-return]


class Conv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d with a rounded weight."""


class Conv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d with a rounded weight."""


class Conv3d(_Convolution, nn.Conv3d):
    """torch.nn.Conv3d with a rounded weight."""


class _Transposed(_Weighted):
    _KEPT = (*_Convolution._KEPT, "output_padding")
    _FUNCTION: Any

    def forward(self: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        moves = (self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        more = self._output_padding(x, output_size, *moves)
        rest = (self.stride, self.padding, more, self.groups, self.dilation)
        return type(self)._FUNCTION(x, self.get_weight(), self.bias, *rest)  # type: ignore[no-any-return]


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d with a rounded weight."""

    _FUNCTION = F.conv_transpose1d


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with a rounded weight."""

    _FUNCTION = F.conv_transpose2d


class ConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d with a rounded weight."""

    _FUNCTION = F.conv_transpose3d


class Embedding(_Weighted, nn.Embedding):
    """torch.nn.Embedding with a rounded table."""

    _KEPT = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def forward(self, input: Tensor) -> Tensor:
        rest = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(input, self.get_weight(), *rest)


class EmbeddingBag(_Weighted, nn.EmbeddingBag):
    """torch.nn.EmbeddingBag with a rounded table."""

    _KEPT = (
        "num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "include_last_offset", "padding_idx",
    )  # fmt: skip

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        rest = (self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode, self.sparse, per_sample_weights)
        return F.embedding_bag(input, self.get_weight(), offsets, *rest, self.include_last_offset, self.padding_idx)


class _Recurrent(ReferenceQuantizedModule):
    """Recurrent layers: a grid for each parameter that `weight_qparams_dict` names.

    Args:
        weight_qparams_dict: parameter -> see `_keep_grid`; 'is_decomposed' is accepted and means nothing here.
        The others are those of the float class.
    """

    @door
    def __init__(self, *args: Any, weight_qparams_dict: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        given = weight_qparams_dict or {}
        for name in [name for name, _ in self.named_parameters() if name.startswith("weight")]:
            self._keep_grid(name, given.get(name))

    @classmethod
    @door
    def from_float(cls, mod: Any, weight_qparams_dict: dict[str, Any]) -> Any:
        """The reference form of a float layer, with the grid of each weight."""
        kept = (
            "input_size",
            "hidden_size",
            "bias",
            "num_layers",
            "batch_first",
            "dropout",
            "bidirectional",
            "proj_size",
        )
        options = {name: getattr(mod, name) for name in kept if getattr(mod, name, None)}
        options["bias"] = mod.bias
        if getattr(mod, "nonlinearity", None) is not None and not isinstance(mod, nn.RNNBase):
            options["nonlinearity"] = mod.nonlinearity
        made = cls(**options, weight_qparams_dict=weight_qparams_dict)
        with torch.no_grad():
            for name, value in mod.named_parameters():
                getattr(made, name).copy_(value)
        return made


class _Layers(_Recurrent):
    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        """As the float class, with rounded weights."""
        held = self._flat_weights
        self._flat_weights = self.get_flat_weights()
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = held

    def get_flat_weights(self: Any) -> list[Tensor]:
        """All parameters in the order of the float class, weights rounded."""
        rounded = set(self._names())
        return [self._rounded(name) if name in rounded else getattr(self, name) for name in self._flat_weights_names]

    def get_quantized_weight_bias_dict(self: Any) -> dict[str, Tensor]:
        """All parameters by name, weights as integers."""
        rounded = set(self._names())
        return {n: self._quantized(n) if n in rounded else getattr(self, n) for n in self._flat_weights_names}


class LSTM(_Layers, nn.LSTM):
    """torch.nn.LSTM with rounded weights."""


class GRU(_Layers, nn.GRU):
    """torch.nn.GRU with rounded weights."""


class _Cell(_Recurrent):
    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """One step, as the float class, with rounded weights."""
        states = 2 if isinstance(self, nn.LSTMCell) else 1
        alone = input.dim() == 1
        x = input.unsqueeze(0) if alone else input
        zeros = torch.zeros(x.shape[0], self.hidden_size, dtype=x.dtype, device=x.device)
        given = (hx if states == 2 else (hx,)) if hx is not None else (zeros,) * states
        before = [one.unsqueeze(0) if one.dim() == 1 else one for one in given]
        parameters = (self.get_weight_ih(), self.get_weight_hh(), self.bias_ih, self.bias_hh)
        made = self._step(x, before if states == 2 else before[0], *parameters)
        if not alone:
            return made
        return tuple(one.squeeze(0) for one in made) if states == 2 else made.squeeze(0)

    def get_weight_ih(self) -> Tensor:
        """The weight of the input, rounded."""
        return self._rounded("weight_ih")

    def get_weight_hh(self) -> Tensor:
        """The weight of the state, rounded."""
        return self._rounded("weight_hh")

    def get_quantized_weight_ih(self) -> Tensor:
        """The weight of the input as integers."""
        return self._quantized("weight_ih")

    def get_quantized_weight_hh(self) -> Tensor:
        """The weight of the state as integers."""
        return self._quantized("weight_hh")


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell with rounded weights."""

    _step = staticmethod(torch.lstm_cell)


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell with rounded weights."""

    _step = staticmethod(torch.gru_cell)


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell with rounded weights."""

    def _step(self, *operands: Any) -> Tensor:
        return (torch.rnn_tanh_cell if self.nonlinearity == "tanh" else torch.rnn_relu_cell)(*operands)
