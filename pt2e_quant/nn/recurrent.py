"""nn.quantized.dynamic's recurrent layers: float in, float out, weights of 8 bits or rounded to float16.

State dicts have the reference's keys with plain tensors under them, so that weights_only=True loads them; the script
objects that the reference keeps there are read, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import QuantizedTensorError
from ..kernels import GATES, Gates, Layers
from ..qtensor.tensor import door
from .held import as_parameters, blank, check_type, hold, moved_held, stored_type
from .observed import quantized_or_float
from .rows import ROWS
from .scripting import Unscripted
from .stored import cell_of, is_script

__all__ = ["GRU", "LSTM", "PackedParameter", "RNNBase"]


class PackedParameter(nn.Module):
    """The weights of one layer in one direction, with their biases.

    Args:
        param: (weight, bias) of the input, of the output before, and of the projection where there is one.
    """

    @door
    def __init__(self, param: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.param = [hold(*one) for one in param]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if is_script(self.param):
            self.param = [hold(*one) for one in cell_of(self.param)]

    def _apply(self, fn: Any, recurse: bool = True) -> PackedParameter:
        self.param = [moved_held(one, fn) for one in self.param]
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "param"] = tuple(as_parameters(one) for one in self.param)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "param" in state_dict:
            self.param = [hold(*one) for one in cell_of(state_dict.pop(prefix + "param"))]
        else:
            rest[2].append(prefix + "param")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class RNNBase(Unscripted, nn.Module):
    """What LSTM and GRU have in common.

    Args:
        mode: "LSTM" or "GRU".
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: of torch.nn.LSTM.
        dtype: of the weights: torch.qint8, or torch.float16, to which they are rounded.
        proj_size: of torch.nn.LSTM, which has it in this place since it is not in the reference.

    Shapes are those of torch.nn.LSTM and GRU, for one sequence without a batch and for a PackedSequence, too.

    Raises:
        QuantizedTensorError: another mode or dtype, a dropout that is no probability, an input or a state of another
            shape.
    """

    _version = ROWS["LSTM"].version

    @door
    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: torch.dtype = torch.qint8,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        if mode not in ("LSTM", "GRU") or (proj_size and mode == "GRU") or not 0 <= proj_size < hidden_size:
            raise QuantizedTensorError(
                f"{self._get_name()}: mode is 'LSTM' or 'GRU', and proj_size, which LSTM alone has, is less than "
                f"hidden_size; got {mode!r}, proj_size={proj_size}, hidden_size={hidden_size}"
            )
        if not 0 <= dropout <= 1:
            raise QuantizedTensorError(f"{self._get_name()}: dropout is a probability, got {dropout}")
        check_type(self._get_name(), dtype)
        self.mode, self.input_size, self.hidden_size, self.num_layers = mode, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size, self.version = bidirectional, proj_size, self._version
        self.training = False
        self._all_weight_values = nn.ModuleList(
            PackedParameter(self._blank(layer, dtype)) for layer in range(num_layers) for _ in range(self._directions)
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"proj_size": 0, **state})  # type: ignore[no-untyped-call]  # the reference has none

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        holder: Any = self._all_weight_values[0]
        return stored_type(holder.param[0])

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _gates(self) -> Gates:
        return GATES[self.mode]

    @property
    def _units(self) -> tuple[int, ...]:
        """The last dimension of each tensor of the state."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: self._gates.states]

    def _blank(self, layer: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
        rows, out = self._gates.chunks * self.hidden_size, self._units[0]
        features = self._directions * out if layer else self.input_size
        made = [blank(rows, columns, dtype, self.bias) for columns in (features, out)]
        return [*made, blank(out, self.hidden_size, dtype, False)] if self.proj_size else made

    def _get_name(self) -> str:
        return "DynamicQuantizedRNN"

    def extra_repr(self) -> str:
        plain = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0, "bidirectional": False}
        given = {name: getattr(self, name) for name, usual in {**plain, "proj_size": 0}.items()}
        shown = [f"{name}={value}" for name, value in given.items() if value != plain.get(name, 0)]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """The outputs of all steps, and the state after the last one."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        alone = input.dim() == 2
        x = input.unsqueeze(1) if alone else input.transpose(0, 1) if self.batch_first else input
        if x.dim() != 3 or x.shape[-1] != self.input_size or not x.shape[0]:
            raise QuantizedTensorError(
                f"{self._get_name()}: the input has 3 dimensions (2 without a batch), at least one step and "
                f"{self.input_size} features, got {tuple(input.shape)}"
            )
        given = hx if hx is None or not alone else self._each(hx, lambda one: one.unsqueeze(1))
        out, last = self._run(x, None, self._state(given, x.shape[1], x))
        if alone:
            return out.squeeze(1), self._each(last, lambda one: one.squeeze(1))
        return out.transpose(0, 1) if self.batch_first else out, last

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, sizes, order, back = input
        given = hx if hx is None or order is None else self._each(hx, lambda one: one.index_select(1, order))
        out, last = self._run(data, sizes, self._state(given, int(sizes[0]), data))
        last = last if back is None else self._each(last, lambda one: one.index_select(1, back))
        return PackedSequence(out, sizes, order, back), last

    def _each(self, state: Any, change: Any) -> Any:
        return tuple(map(change, state)) if self._gates.states == 2 else change(state)

    def _state(self, hx: Any, batch: int, x: Tensor) -> tuple[Tensor, ...]:
        shapes = [(self.num_layers * self._directions, batch, units) for units in self._units]
        if hx is None:
            made = {shape: torch.zeros(shape, device=x.device) for shape in shapes}  # one for both of most LSTMs
            return tuple(made[shape] for shape in shapes)
        given = tuple(hx) if self._gates.states == 2 else (hx,)
        if [tuple(one.shape) for one in given] != shapes:
            raise QuantizedTensorError(
                f"{self._get_name()}: a state of shape {shapes} is expected, got {[tuple(one.shape) for one in given]}"
            )
        return tuple(one.float() for one in given)

    def _run(self, x: Tensor, sizes: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        weights: Any = [holder.param for holder in self._all_weight_values]
        layers = Layers(self.mode, weights, self._directions, self.dropout if self.training else 0.0)
        out, last = layers.run(x.float(), sizes, state)
        if x.dtype is not torch.float32:
            out, last = out.to(x.dtype), tuple(one.to(x.dtype) for one in last)
        return out, last if len(last) > 1 else last[0]

    # --- weights ------------------------------------------------------------------------------------------------------

    def _names(self) -> list[list[tuple[str, str]]]:
        """For each layer and direction, the names of each weight and its bias."""
        parts = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        suffixes = ("", "_reverse")[: self._directions]
        ends = [f"l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]
        return [[(f"weight_{part}_{end}", f"bias_{part}_{end}") for part in parts] for end in ends]

    @door
    def set_weight_bias(self, weight_bias_dict: Mapping[str, Tensor | None]) -> None:
        """Take other weights (QTensors, torch's own, or float ones for float16) and biases, under torch.nn's names."""
        given = weight_bias_dict
        for holder, names in zip(self._all_weight_values, self._names(), strict=True):
            holder.param = [hold(given[w], given.get(b)) for w, b in names]  # type: ignore[arg-type, assignment]

    def _weight_bias(self) -> dict[str, dict[str, Any]]:
        made: dict[str, dict[str, Any]] = {"weight": {}, "bias": {}}
        for holder, names in zip(self._all_weight_values, self._names(), strict=True):
            for (weight, bias), held in zip(names, holder.param, strict=True):  # type: ignore[arg-type]
                made["weight"][weight], made["bias"][bias] = as_parameters(held)
        return made

    def get_weight(self) -> dict[str, Tensor]:
        """Weights under torch.nn's names, quantized."""
        return self._weight_bias()["weight"]

    def get_bias(self) -> dict[str, Tensor | None]:
        """Biases under torch.nn's names."""
        return self._weight_bias()["bias"]

    @classmethod
    def empty_like(cls, module: Any, dtype: torch.dtype = torch.qint8) -> Any:
        """One with the sizes of a float module, and weights of zeros."""
        kept = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        options = {name: getattr(module, name) for name in (*kept, "proj_size")}
        kind: Any = cls if cls is not RNNBase else {"LSTM": LSTM, "GRU": GRU}[module.mode]
        return kind(**options, dtype=dtype)

    @classmethod
    @door
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """The quantized form of a torch.nn.LSTM or GRU with a `qconfig`; each weight has an observer of its own.

        Raises:
            QuantizedTensorError: it has none, or the type of the weight is neither int8 nor float16.
        """
        weights = {name: quantized_or_float(mod, value) for name, value in mod.named_parameters() if "weight" in name}
        dtype = weights["weight_ih_l0"].dtype
        made = cls.empty_like(mod, torch.qint8 if dtype is torch.qint8 else torch.float16)
        made.set_weight_bias({**dict(mod.named_parameters()), **weights})
        return made

    @classmethod
    @door
    def from_reference(cls, ref_mod: Any) -> Any:
        """The quantized form of a reference module."""
        made = cls.empty_like(ref_mod, ref_mod.weight_ih_l0_dtype)
        made.set_weight_bias(ref_mod.get_quantized_weight_bias_dict())
        return made


class LSTM(RNNBase):
    """torch.nn.LSTM with int8 products. Arguments: those of torch.nn.LSTM, then dtype (see RNNBase).

    The input of a layer is quantized as a whole, the output before each step with the range of that step.
    """

    row = ROWS["LSTM"]

    @door
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _get_name(self) -> str:
        return "DynamicQuantizedLSTM"


class GRU(RNNBase):
    """torch.nn.GRU with int8 products. Arguments: those of torch.nn.GRU, then dtype (see RNNBase)."""

    row = ROWS["GRU"]

    @door
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)

    def _get_name(self) -> str:
        return "DynamicQuantizedGRU"
