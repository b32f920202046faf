"""LSTM out of linears and functionals, so that each intermediate result can be observed and quantized."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import kernels, qparams
from ...errors import QuantizedTensorError
from ...qtensor import QTensor, quantize_per_tensor
from ...qtensor.tensor import door
from ..functional_modules import FloatFunctional
from .steps import check_float, observed, quantized

__all__ = ["LSTM", "LSTMCell", "QuantizedLSTM", "QuantizedLSTMCell"]

State = tuple[Tensor, Tensor]
_GATES = ("input", "forget", "cell", "output")
"""In the order of torch.nn.LSTM's weights."""


class LSTMCell(nn.Module):
    """torch.nn.LSTMCell; names of modules, and so of a state dict, are the reference's.

    Args:
        input_dim, hidden_dim, bias, device, dtype: of torch.nn.LSTMCell.
        split_gates: a linear for each gate, so that each has a grid of its own.

    Shapes: (batch, input_dim) and states of (batch, hidden_dim) -> two states of (batch, hidden_dim).
    """

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.LSTMCell
    _observes_inside = True

    @door
    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias, self.split_gates = input_dim, hidden_dim, bias, split_gates
        options: Any = {"bias": bias, "device": device, "dtype": dtype}
        if split_gates:
            self.igates: nn.Module = nn.ModuleDict({g: nn.Linear(input_dim, hidden_dim, **options) for g in _GATES})
            self.hgates: nn.Module = nn.ModuleDict({g: nn.Linear(hidden_dim, hidden_dim, **options) for g in _GATES})
            self.gates: nn.Module = nn.ModuleDict({g: FloatFunctional() for g in _GATES})
        else:
            self.igates = nn.Linear(input_dim, 4 * hidden_dim, **options)
            self.hgates = nn.Linear(hidden_dim, 4 * hidden_dim, **options)
            self.gates = FloatFunctional()
        self.input_gate, self.forget_gate = nn.Sigmoid(), nn.Sigmoid()
        self.cell_gate, self.output_gate = nn.Tanh(), nn.Sigmoid()
        self.fgate_cx, self.igate_cgate = FloatFunctional(), FloatFunctional()
        self.fgate_cx_igate_cgate, self.ogate_cy = FloatFunctional(), FloatFunctional()
        self.initial_hidden_state_qparams: tuple[float, int] = (1.0, 0)
        self.initial_cell_state_qparams: tuple[float, int] = (1.0, 0)
        self.hidden_state_dtype = self.cell_state_dtype = torch.quint8

    def forward(self, x: Tensor, hidden: State | None = None) -> State:
        """The next hidden state and the next cell state."""
        if hidden is None or hidden[0] is None or hidden[1] is None:
            hidden = self.initialize_hidden(x.shape[0], x.is_quantized)
        sums = self._sums(x, hidden[0])
        enter, forget = self.input_gate(sums[0]), self.forget_gate(sums[1])
        new, leave = self.cell_gate(sums[2]), self.output_gate(sums[3])
        kept, added = self.fgate_cx.mul(forget, hidden[1]), self.igate_cgate.mul(enter, new)
        cell = self.fgate_cx_igate_cgate.add(kept, added)
        return self.ogate_cy.mul(leave, torch.tanh(cell)), cell

    def _sums(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        i, h_, add = self.igates, self.hgates, self.gates
        if not self.split_gates:
            return add.add(i(x), h_(h)).chunk(4, 1)  # type: ignore[operator, no-any-return]
        return tuple(add[g].add(i[g](x), h_[g](h)) for g in _GATES)  # type: ignore[index]

    def initialize_hidden(self, batch_size: int, is_quantized: bool = False) -> State:
        """Both states before the first step: zeros."""
        h, c = torch.zeros(batch_size, self.hidden_size), torch.zeros(batch_size, self.hidden_size)
        if not is_quantized:
            return h, c
        return (
            quantize_per_tensor(h, *self.initial_hidden_state_qparams, self.hidden_state_dtype),
            quantize_per_tensor(c, *self.initial_cell_state_qparams, self.cell_state_dtype),
        )

    def _get_name(self) -> str:
        return "QuantizableLSTMCell"

    @classmethod
    def from_params(
        cls, wi: Tensor, wh: Tensor, bi: Tensor | None = None, bh: Tensor | None = None, split_gates: bool = False
    ) -> Any:
        """One with the weights and biases of torch.nn.LSTMCell.

        Args:
            wi, bi: (4 * units, features), (4 * units,): of the input.
            wh, bh: (4 * units, units), (4 * units,): of the hidden state.
        """
        made = cls(wi.shape[1], wh.shape[1], bi is not None, split_gates=split_gates)
        for gates, weight, bias in ((made.igates, wi, bi), (made.hgates, wh, bh)):
            linears: Any = [gates[g] for g in _GATES] if split_gates else [gates]  # type: ignore[index]
            parts = len(linears)
            for at, linear in enumerate(linears):
                linear.weight = nn.Parameter(weight.chunk(parts)[at])
                linear.bias = None if bias is None else nn.Parameter(bias.chunk(parts)[at])
        return made

    @classmethod
    def from_float(cls, other: Any, use_precomputed_fake_quant: bool = False, split_gates: bool = False) -> Any:
        """The observed form of a torch.nn.LSTMCell with a qconfig.

        Raises:
            QuantizedTensorError: it is none, or has no qconfig.
        """
        check_float(cls, other)
        made = cls.from_params(other.weight_ih, other.weight_hh, other.bias_ih, other.bias_hh, split_gates)
        return observed(made, other)


class _Direction(nn.Module):
    """A cell, step by step."""

    def __init__(self, cell: LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, hidden: State) -> tuple[Tensor, State]:
        outputs = []
        for step in x.unbind(0):
            hidden = self.cell(step, hidden)
            outputs.append(hidden[0])
        return torch.stack(outputs), hidden


class _Layer(nn.Module):
    """One layer: a direction, or two."""

    def __init__(self, forward: LSTMCell, backward: LSTMCell | None) -> None:
        super().__init__()
        self.layer_fw = _Direction(forward)
        if backward is not None:
            self.layer_bw = _Direction(backward)

    def forward(self, x: Tensor, hidden: list[State]) -> tuple[Tensor, list[State]]:
        out, end = self.layer_fw(x, hidden[0])
        if len(hidden) == 1:
            return out, [end]
        back, end_back = self.layer_bw(x.flip(0), hidden[1])
        return _joined(torch.cat, [out, back.flip(0)], -1), [end, end_back]


class LSTM(nn.Module):
    """torch.nn.LSTM; names of modules, and so of a state dict, are the reference's.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: of torch.nn.LSTM.
        split_gates: see LSTMCell.

    Shapes are those of torch.nn.LSTM with a batch.

    Raises:
        QuantizedTensorError: dropout is no probability.
    """

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.LSTM
    _observes_inside = True

    @door
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise QuantizedTensorError(f"{self._get_name()}: dropout is a probability, got {dropout}")
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.training = False
        options: Any = {"bias": bias, "device": device, "dtype": dtype, "split_gates": split_gates}
        width = hidden_size * self._directions
        sizes = [input_size, *[width] * (num_layers - 1)]
        cells = [[LSTMCell(size, hidden_size, **options) for _ in range(self._directions)] for size in sizes]
        self.layers = nn.ModuleList(_Layer(one[0], one[1] if bidirectional else None) for one in cells)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, State]:
        """The outputs of all steps, and both states after the last one."""
        if self.batch_first:
            x = x.transpose(0, 1)
        states, ends = self._states(x, hidden), []
        for at, layer in enumerate(self.layers):
            if at and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            x, end = layer(x, states[at])
            ends += end
        last = _joined(torch.stack, [h for h, _ in ends], 0), _joined(torch.stack, [c for _, c in ends], 0)
        return x.transpose(0, 1) if self.batch_first else x, last

    def _states(self, x: Tensor, hidden: Any) -> list[list[State]]:
        """For each layer and direction."""
        count = self.num_layers * self._directions
        if hidden is None:
            zeros: Tensor = torch.zeros(x.shape[1], self.hidden_size, device=x.device)
            if x.is_quantized:
                zeros = quantize_per_tensor(zeros, 1.0, 0, torch.quint8)
            flat = [(zeros, zeros)] * count
        else:
            flat = list(zip(hidden[0].unbind(0), hidden[1].unbind(0), strict=True))
        if len(flat) != count:
            raise QuantizedTensorError(
                f"{self._get_name()}: {count} states are needed, one for each layer and direction, got {len(flat)}"
            )
        return [flat[at : at + self._directions] for at in range(0, count, self._directions)]

    def _get_name(self) -> str:
        return "QuantizableLSTM"

    @classmethod
    def from_float(cls, other: Any, qconfig: Any = None, split_gates: bool = False) -> Any:
        """The observed form of a torch.nn.LSTM with a qconfig.

        Raises:
            QuantizedTensorError: it is none, has no qconfig, or has projections.
        """
        check_float(cls, other, qconfig)
        if other.proj_size:
            raise QuantizedTensorError(f"{cls.__name__}: an LSTM with proj_size has a dynamic quantized form alone")
        kept = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        made = cls(**{name: getattr(other, name) for name in kept}, split_gates=split_gates)
        for at, layer in enumerate(made.layers):
            for name, suffix in (("layer_fw", ""), ("layer_bw", "_reverse"))[: made._directions]:
                wi, wh, bi, bh = (getattr(other, f"{part}_l{at}{suffix}", None) for part in _PARAMETERS)
                getattr(layer, name).cell = LSTMCell.from_params(wi, wh, bi, bh, split_gates)  # type: ignore[arg-type]
        return observed(made, other, qconfig)


_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _joined(join: Any, parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat or torch.stack; of tensors with several grids, on one grid that holds them all."""
    grids = {(one.q_scale(), one.q_zero_point()) for one in parts if isinstance(one, QTensor)}
    if len(grids) < 2:
        return join(parts, dim)  # type: ignore[no-any-return]
    if join is torch.stack:
        return _joined(torch.cat, [one.unsqueeze(dim) for one in parts], dim)
    ends = [(one.q_scale() * (end - one.q_zero_point())) for one in parts for end in one.limits]  # type: ignore[attr-defined]
    scale, zero_point = qparams.affine_numbers(min(ends), max(ends), *parts[0].limits)  # type: ignore[attr-defined]
    return kernels.cat(parts, dim, scale, zero_point)  # type: ignore[arg-type]


class QuantizedLSTMCell(LSTMCell):
    """What becomes of an observed LSTMCell: nn.quantized.LSTMCell."""

    _FLOAT_MODULE = LSTMCell

    def _get_name(self) -> str:
        return "QuantizedLSTMCell"

    @classmethod
    def from_observed(cls, other: LSTMCell) -> Any:
        """The quantized form of an observed and calibrated one."""
        return quantized(cls, other)


class QuantizedLSTM(LSTM):
    """What becomes of an observed LSTM: nn.quantized.LSTM."""

    _FLOAT_MODULE = LSTM

    def _get_name(self) -> str:
        return "QuantizedLSTM"

    @classmethod
    def from_observed(cls, other: LSTM) -> Any:
        """The quantized form of an observed and calibrated one."""
        return quantized(cls, other)
