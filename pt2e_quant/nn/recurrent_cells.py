"""nn.quantized.dynamic's RNNCell, LSTMCell and GRUCell: one step of a recurrent layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizedTensorError
from ..kernels import GATES, Gates, Held, Layers
from ..qtensor.tensor import door
from .held import as_parameters, blank, check_type, hold, moved_held, stored_type
from .observed import quantized_or_float
from .rows import ROWS
from .scripting import Unscripted
from .stored import is_script, linear_of

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "RNNCellBase"]

_PARTS = ("ih", "hh")


class RNNCellBase(Unscripted, nn.Module):
    """What the cells have in common.

    Args:
        input_size, hidden_size, bias: of torch.nn.LSTMCell.
        num_chunks: a weight has so many rows for each unit.
        dtype: of the weights: torch.qint8, or torch.float16, to which they are rounded.

    Shapes: (batch, input_size), or (input_size,), and states with hidden_size in the place of that.

    Raises:
        QuantizedTensorError: another dtype, an input or a state of another shape.
    """

    @door
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_chunks: int = 4,
        dtype: torch.dtype = torch.qint8,
    ) -> None:
        super().__init__()
        check_type(self._get_name(), dtype)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        rows = num_chunks * hidden_size
        self._packed_weight_ih: Held = hold(*blank(rows, input_size, dtype, bias))
        self._packed_weight_hh: Held = hold(*blank(rows, hidden_size, dtype, bias))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, stored in vars(self).copy().items():
            if is_script(stored):
                setattr(self, name, hold(*linear_of(stored)))

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type of the weights."""
        return stored_type(self._packed_weight_ih)

    @property
    def bias_ih(self) -> Tensor | None:
        """What is added to the product with the input."""
        return as_parameters(self._packed_weight_ih)[1]

    @property
    def bias_hh(self) -> Tensor | None:
        """What is added to the product with the state."""
        return as_parameters(self._packed_weight_hh)[1]

    @property
    def _mode(self) -> str:
        """A key of GATES."""
        return type(self).__name__.removesuffix("Cell")

    @property
    def _gates(self) -> Gates:
        return GATES[self._mode]

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else f", bias={self.bias}")
        nonlinearity = getattr(self, "nonlinearity", "tanh")
        return shown if nonlinearity == "tanh" else f"{shown}, nonlinearity={nonlinearity}"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The next state: (h, c) of an LSTM cell, h of the others."""
        alone = input.dim() == 1
        x = input.unsqueeze(0) if alone else input
        state = self._state(hx, x, alone)
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise QuantizedTensorError(
                f"{self._get_name()}: the input has 2 dimensions (1 without a batch) and {self.input_size} features, "
                f"got {tuple(input.shape)}"
            )
        weights = (self._packed_weight_ih, self._packed_weight_hh)
        after = Layers(self._mode, [weights]).step(x.float(), state)
        made = tuple((one.squeeze(0) if alone else one).to(input.dtype) for one in after)
        return made if len(made) > 1 else made[0]

    def _state(self, hx: Any, x: Tensor, alone: bool) -> tuple[Tensor, ...]:
        shape, states = (len(x), self.hidden_size), self._gates.states
        if hx is None:
            return (torch.zeros(shape, device=x.device),) * states
        given = tuple(one.unsqueeze(0) if alone else one for one in (hx if states == 2 else (hx,)))
        if [tuple(one.shape) for one in given] != [shape] * states:
            raise QuantizedTensorError(
                f"{self._get_name()}: {states} state(s) of shape {shape} are expected, got "
                f"{[tuple(one.shape) for one in given]}"
            )
        return tuple(one.float() for one in given)

    @door
    def set_weight_bias(self, weight_bias_dict: Mapping[str, Mapping[str, Tensor | None]]) -> None:
        """Take other parameters: {"weight": {"weight_ih": ..., "weight_hh": ...}, "bias": {"bias_ih": ..., ...}}."""
        weights: Any = weight_bias_dict["weight"]
        biases = weight_bias_dict["bias"]
        for part in _PARTS:
            setattr(self, f"_packed_weight_{part}", hold(weights[f"weight_{part}"], biases[f"bias_{part}"]))

    def _weight_bias(self) -> dict[str, dict[str, Any]]:
        held = {part: as_parameters(getattr(self, f"_packed_weight_{part}")) for part in _PARTS}
        weights = {f"weight_{part}": weight for part, (weight, _) in held.items()}
        return {"weight": weights, "bias": {f"bias_{part}": bias for part, (_, bias) in held.items()}}

    def get_weight(self) -> dict[str, Tensor]:
        """Weights under torch.nn's names, quantized."""
        return self._weight_bias()["weight"]

    def get_bias(self) -> dict[str, Tensor | None]:
        """Biases under torch.nn's names."""
        return self._weight_bias()["bias"]

    def _apply(self, fn: Any, recurse: bool = True) -> RNNCellBase:
        for part in _PARTS:
            name = f"_packed_weight_{part}"
            setattr(self, name, moved_held(getattr(self, name), fn))
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part in _PARTS:
            name = f"_packed_weight_{part}"
            destination[prefix + name] = as_parameters(getattr(self, name))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in (f"_packed_weight_{part}" for part in _PARTS):
            if prefix + name in state_dict:
                setattr(self, name, hold(*linear_of(state_dict.pop(prefix + name))))
            else:
                rest[2].append(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def empty_like(cls, module: Any, dtype: torch.dtype = torch.qint8) -> Any:
        """One with the sizes of a float module, and weights of zeros."""
        kinds = (LSTMCell, GRUCell, RNNCell)
        kind: Any = cls if cls is not RNNCellBase else next(k for k in kinds if isinstance(module, _FLOAT[k.__name__]))
        options = {"nonlinearity": module.nonlinearity} if kind is RNNCell else {}
        return kind(module.input_size, module.hidden_size, module.bias, dtype=dtype, **options)

    @classmethod
    @door
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """The quantized form of a torch.nn cell with a `qconfig`; each weight has an observer of its own.

        Raises:
            QuantizedTensorError: it has none, or the type of the weight is neither int8 nor float16.
        """
        weights = {f"weight_{part}": quantized_or_float(mod, getattr(mod, f"weight_{part}")) for part in _PARTS}
        dtype = weights["weight_ih"].dtype
        made = cls.empty_like(mod, torch.qint8 if dtype is torch.qint8 else torch.float16)
        made.set_weight_bias({"weight": weights, "bias": {f"bias_{p}": getattr(mod, f"bias_{p}") for p in _PARTS}})
        return made

    @classmethod
    @door
    def from_reference(cls, ref_mod: Any) -> Any:
        """The quantized form of a reference module."""
        made = cls.empty_like(ref_mod, ref_mod.weight_ih_dtype)
        weights = {"weight_ih": ref_mod.get_quantized_weight_ih(), "weight_hh": ref_mod.get_quantized_weight_hh()}
        made.set_weight_bias({"weight": weights, "bias": {"bias_ih": ref_mod.bias_ih, "bias_hh": ref_mod.bias_hh}})
        return made


_FLOAT = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}


class RNNCell(RNNCellBase):
    """torch.nn.RNNCell with int8 products.

    Args:
        nonlinearity: "tanh" or "relu"; the others are those of RNNCellBase.
    """

    row = ROWS["RNNCell"]

    @door
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        dtype: torch.dtype = torch.qint8,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, dtype=dtype)
        if nonlinearity not in ("tanh", "relu"):
            raise QuantizedTensorError(f"RNNCell: nonlinearity is 'tanh' or 'relu', not {nonlinearity!r}")
        self.nonlinearity = nonlinearity

    @property
    def _mode(self) -> str:
        return self.nonlinearity


class LSTMCell(RNNCellBase):
    """torch.nn.LSTMCell with int8 products. Arguments: those of RNNCellBase without num_chunks."""

    row = ROWS["LSTMCell"]

    @door
    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype = torch.qint8) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, dtype=dtype)


class GRUCell(RNNCellBase):
    """torch.nn.GRUCell with int8 products. Arguments: those of RNNCellBase without num_chunks."""

    row = ROWS["GRUCell"]

    @door
    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype = torch.qint8) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, dtype=dtype)
