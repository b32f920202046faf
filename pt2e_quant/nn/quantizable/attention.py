"""MultiheadAttention out of linears, so that each of its products with weights can be observed and quantized.

The products of queries, keys and values stay in float, as in the reference.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import QuantizedTensorError
from ...qtensor.tensor import door
from ..functional_modules import FloatFunctional
from ..stubs import DeQuantStub, QuantStub
from .steps import check_float, observed, quantized

__all__ = ["MultiheadAttention", "QuantizedMultiheadAttention"]

_PACKED = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of torch.nn's class in whose place there are linears."""


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention; arguments and shapes are its own, for inputs with a batch.

    Inputs are quantized once it is converted, and so are the outputs.
    """

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    _observes_inside = True

    @door
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: Any = {"device": device, "dtype": dtype}
        sizes: Any = (add_bias_kv, add_zero_attn, kdim, vdim, batch_first)
        super().__init__(embed_dim, num_heads, dropout, bias, *sizes, **options)
        for name in _PACKED:  # None also keeps torch's fused kernel, which would read them, from being taken
            setattr(self, name, None)
        self.linear_Q = nn.Linear(embed_dim, embed_dim, bias, **options)
        self.linear_K = nn.Linear(self.kdim, embed_dim, bias, **options)
        self.linear_V = nn.Linear(self.vdim, embed_dim, bias, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **options)  # type: ignore[assignment]
        self.q_scaling_product = FloatFunctional()
        self.quant_attn_output, self.quant_attn_output_weights = QuantStub(), QuantStub()
        self.dequant_q, self.dequant_k, self.dequant_v = DeQuantStub(), DeQuantStub(), DeQuantStub()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs, and the weights of the attention where they are wanted. Arguments are torch.nn's."""
        if is_causal and attn_mask is None:
            raise QuantizedTensorError(f"{self._get_name()}: is_causal is a hint about attn_mask; pass that, too")
        if self.batch_first:
            query, key, value = (one.transpose(0, 1) for one in (query, key, value))
        steps, batch = query.shape[:2]
        q, k, v = self._projected(query, key, value)
        weights = F.softmax(self._scores(q, k, batch, attn_mask, key_padding_mask), dim=-1)
        mixed = torch.bmm(F.dropout(weights, self.dropout, self.training), v)
        mixed = mixed.transpose(0, 1).reshape(steps, batch, self.embed_dim)
        out = self.out_proj(self.quant_attn_output(mixed.transpose(0, 1) if self.batch_first else mixed))
        weights = self.quant_attn_output_weights(weights)
        if not need_weights:
            return out, None
        weights = weights.view(batch, self.num_heads, steps, k.shape[1])
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, scaled, keys and values in float, (batch * heads, steps, width of a head) each."""
        q = self.q_scaling_product.mul_scalar(self.linear_Q(query), self.head_dim**-0.5)
        k, v = self.dequant_k(self.linear_K(key)), self.dequant_v(self.linear_V(value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([one, bias.expand(-1, one.shape[1], -1)])
                for one, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (self._by_head(one) for one in (self.dequant_q(q), k, v))
        if self.add_zero_attn:
            k, v = (F.pad(one, (0, 0, 0, 1)) for one in (k, v))
        return q, k, v

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] * self.num_heads, self.head_dim).transpose(0, 1)

    def _scores(self, q: Tensor, k: Tensor, batch: int, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores = scores + self._penalty(mask, k.shape[1])
        if padding is not None:
            by_row = self._penalty(padding, k.shape[1]).repeat_interleave(self.num_heads, 0)
            scores = scores + by_row.unsqueeze(1)
        return scores

    def _penalty(self, mask: Tensor, steps: int) -> Tensor:
        """What a mask adds to scores; positions that this module appends are seen."""
        if not mask.is_floating_point():
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(mask.bool(), float("-inf"))
        return F.pad(mask, (0, steps - mask.shape[-1]))

    def _get_name(self) -> str:
        return "QuantizableMultiheadAttention"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in _PACKED:  # the reference saves them, and does not use them
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def from_float(cls, other: nn.MultiheadAttention) -> Any:
        """The observed form of a torch.nn.MultiheadAttention with a qconfig.

        Raises:
            QuantizedTensorError: it is none, or has no qconfig.
        """
        check_float(cls, other)
        made = cls(
            other.embed_dim, other.num_heads, other.dropout, other.in_proj_bias is not None,
            other.bias_k is not None, other.add_zero_attn, other.kdim, other.vdim, other.batch_first,
        )  # fmt: skip
        made.bias_k, made.bias_v = other.bias_k, other.bias_v
        made.out_proj.weight, made.out_proj.bias = other.out_proj.weight, other.out_proj.bias
        for linear, weight, bias in zip(made._linears(), *_unpacked(other), strict=True):
            linear.weight, linear.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        return observed(made, other)

    def dequantize(self) -> nn.MultiheadAttention:
        """The torch.nn.MultiheadAttention with the weights that this one computes with, once it is converted."""
        pairs = [_weight_bias(linear) for linear in (*self._linears(), self.out_proj)]
        made = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, pairs[0][1] is not None, self.bias_k is not None,
            self.add_zero_attn, self.kdim, self.vdim, self.batch_first,
        )  # fmt: skip
        made.bias_k, made.bias_v = self.bias_k, self.bias_v
        with torch.no_grad():
            for target, (weight, bias) in zip(zip(*_unpacked(made), strict=True), pairs, strict=False):
                target[0].copy_(weight)
                if bias is not None:
                    target[1].copy_(bias)
        made.out_proj.weight, bias = nn.Parameter(pairs[3][0]), pairs[3][1]
        if bias is not None:
            made.out_proj.bias = nn.Parameter(bias)
        return made.train(self.training)

    def _linears(self) -> tuple[Any, ...]:
        return self.linear_Q, self.linear_K, self.linear_V


def _with(x: Tensor, bias: Tensor) -> Tensor:
    """One step more, the same for all of a batch."""
    return torch.cat([x, bias.expand(-1, x.shape[1], -1)])


def _unpacked(float_module: nn.MultiheadAttention) -> tuple[Any, Any]:
    """Weights and biases of queries, keys and values."""
    m = float_module
    same = m.in_proj_weight is not None
    weights = m.in_proj_weight.chunk(3) if same else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    return weights, (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)


def _weight_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Of a float or quantized linear, in float."""
    weight, bias = (linear.weight, linear.bias) if isinstance(linear, nn.Linear) else linear._weight_bias()
    bias = None if bias is None else bias.detach().clone()
    return (weight.dequantize() if weight.is_quantized else weight.detach().clone()), bias


class QuantizedMultiheadAttention(MultiheadAttention):
    """What becomes of an observed MultiheadAttention: nn.quantized.MultiheadAttention."""

    _FLOAT_MODULE = MultiheadAttention

    def _get_name(self) -> str:
        return "QuantizedMultiheadAttention"

    @classmethod
    def from_observed(cls, other: MultiheadAttention) -> Any:
        """The quantized form of an observed and calibrated one."""
        return quantized(cls, other)
