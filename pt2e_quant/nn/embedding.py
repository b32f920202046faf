"""nn.quantized.Embedding and EmbeddingBag: tables of 8 or 4 bits with a scale and a float zero point for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import QuantizedTensorError
from ..qconfig import float_qparams_weight_only_qconfig
from ..qtensor import QTensor, quantize_per_channel
from ..qtensor.tensor import door
from .observed import as_quantized, quantize_weight, weight_observer
from .rows import ROWS
from .scripting import Unscripted
from .stored import table_of

__all__ = ["Embedding", "EmbeddingBag", "EmbeddingPackedParams"]

_TYPES = (torch.quint8, torch.quint4x2)


class EmbeddingPackedParams(nn.Module):
    """The table: a module of its own, since state dicts of the reference have it."""

    @door
    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__()
        if dtype not in _TYPES:
            raise QuantizedTensorError(f"a quantized embedding is torch.quint8 or torch.quint4x2, not {dtype}")
        self.dtype = dtype
        self.set_weight(_empty(num_embeddings, embedding_dim, dtype))

    @door
    def set_weight(self, weight: Tensor) -> None:
        """Take another table: (rows, width), quantized to `dtype` with a scale for each row."""
        table = as_quantized(weight, "Embedding.set_weight")
        if table.stored_as is not self.dtype or table.axis not in (0, None):
            raise QuantizedTensorError(
                f"this embedding takes {self.dtype} with a scale for each row, got {table.stored_as}, axis {table.axis}"
            )
        self.table = table

    def _weight(self) -> QTensor:
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: it holds parameters."""
        return x

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_packed_weight" in vars(self):  # of the reference
            self.set_weight(table_of(vars(self).pop("_packed_weight")))

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingPackedParams:
        self.table = self.table.to(fn(self.table.codes).device)  # type: ignore[assignment]
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "dtype"] = self.dtype
        destination[prefix + "_packed_weight"] = self.table

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        self.dtype = state_dict.pop(prefix + "dtype", self.dtype)
        if prefix + "_packed_weight" in state_dict:
            self.set_weight(state_dict.pop(prefix + "_packed_weight"))
        else:
            missing.append(prefix + "_packed_weight")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)


class Embedding(Unscripted, nn.Module):
    """Rows of a quantized table, in float32. The arguments are those of torch.nn.Embedding.

    Args:
        dtype: torch.quint8, or torch.quint4x2.

    Shapes: integers (*) -> (*, embedding_dim).
    """

    row = ROWS["Embedding"]

    @door
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        dtype: torch.dtype = torch.quint8,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._packed_params = EmbeddingPackedParams(num_embeddings, embedding_dim, dtype)
        if _weight is not None:
            if tuple(_weight.shape) != (num_embeddings, embedding_dim):
                raise QuantizedTensorError(
                    f"{self._get_name()}({num_embeddings}, {embedding_dim}) got a table of shape {tuple(_weight.shape)}"
                )
            self.set_weight(_weight)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the table."""
        return self._packed_params.dtype

    def forward(self, indices: Tensor) -> Tensor:
        return kernels.embedding(self.weight(), indices)

    @door
    def set_weight(self, w: Tensor) -> None:
        """Take another table, quantized with a scale for each row."""
        self._packed_params.set_weight(w)

    def weight(self) -> QTensor:
        """The quantized table, (num_embeddings, embedding_dim)."""
        return self._packed_params._weight()

    def _get_name(self) -> str:
        return f"Quantized{self.row.shown}"

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    def extra_repr(self) -> str:
        sizes = f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"
        return f"{sizes}, dtype={self.dtype}, qscheme={self.weight().qscheme()}"

    @classmethod
    def _options(cls, module: Any) -> dict[str, Any]:
        return {}

    @classmethod
    @door
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Embedding:
        """The quantized form of a float (or trained) embedding; without a qconfig, 8 bits.

        Raises:
            QuantizedTensorError: its observer does not choose float zero points.
        """
        observer = weight_observer(mod, mod, float_qparams_weight_only_qconfig.weight)
        if observer.qscheme is not torch.per_channel_affine_float_qparams:
            raise QuantizedTensorError(
                f"embeddings have float zero points (float_qparams_weight_only_qconfig), not {observer.qscheme}"
            )
        table = quantize_weight(mod.weight, observer)
        return cls(mod.num_embeddings, mod.embedding_dim, _weight=table, dtype=table.stored_as, **cls._options(mod))

    @classmethod
    @door
    def from_reference(cls, ref_embedding: Any) -> Embedding:
        """The quantized form of a reference embedding."""
        table, sizes = ref_embedding.get_quantized_weight(), (ref_embedding.num_embeddings, ref_embedding.embedding_dim)
        return cls(*sizes, _weight=table, dtype=table.stored_as, **cls._options(ref_embedding))


class EmbeddingBag(Embedding):
    """Sums or means of rows of a quantized table, in float32. The arguments are those of torch.nn.EmbeddingBag."""

    row = ROWS["EmbeddingBag"]

    @door
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "sum",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        dtype: torch.dtype = torch.quint8,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, _weight=_weight, dtype=dtype)
        self.mode, self.include_last_offset, self.pruned_weights = mode, include_last_offset, False

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        compressed_indices_mapping: Tensor | None = None,
    ) -> Tensor:
        return kernels.embedding_bag(
            self.weight(), indices, offsets, per_sample_weights, compressed_indices_mapping,
            mode=self.mode, include_last_offset=self.include_last_offset,
        )  # fmt: skip

    @classmethod
    def _options(cls, module: Any) -> dict[str, Any]:
        return {"mode": module.mode, "include_last_offset": module.include_last_offset}


def _empty(rows: int, width: int, dtype: torch.dtype) -> QTensor:
    return quantize_per_channel(torch.zeros(rows, width), torch.ones(rows), torch.zeros(rows), 0, dtype)
