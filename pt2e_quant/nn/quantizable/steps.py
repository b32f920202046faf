"""The steps of eager mode on one of these modules, whose layers inside are observed and quantized one by one."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import QuantizedTensorError

__all__ = ["check_float", "observed", "quantized"]


def check_float(kind: Any, other: nn.Module, qconfig: Any = None) -> None:
    """
    Raises:
        QuantizedTensorError: it is not what `from_float` takes, or no qconfig says how to observe it.
    """
    if hasattr(kind, "from_observed"):
        raise QuantizedTensorError(f"{kind.__name__} is made by from_observed, after `prepare` and a calibration")
    if not isinstance(other, kind._FLOAT_MODULE):
        wanted = f"torch.nn.{kind._FLOAT_MODULE.__name__}"
        raise QuantizedTensorError(f"{kind.__name__}.from_float takes a {wanted}, got {type(other).__name__}")
    if getattr(other, "qconfig", None) is None and qconfig is None:
        raise QuantizedTensorError(f"{kind.__name__}.from_float: the {type(other).__name__} has no qconfig; set one")


def observed(made: nn.Module, other: nn.Module, qconfig: Any = None) -> nn.Module:
    """With observers inside, or fake quantizers where the float module is trained; as `prepare` wants it back."""
    from ...eager import prepare, prepare_qat
    from ...eager.hooks import remove_hooks

    made.qconfig = getattr(other, "qconfig", None) or qconfig
    made.train(other.training)
    if other.training:
        made = prepare_qat(made, inplace=True)
    else:
        made = prepare(made, inplace=True, prepare_custom_config_dict={})
    remove_hooks(made)  # what looks for missing stubs; whether there is one, the model around this knows
    return made


def quantized(kind: type[nn.Module], other: nn.Module) -> nn.Module:
    """A copy with quantized layers inside, as `kind`."""
    from ...eager import convert

    made = convert(other, convert_custom_config_dict={})
    made.__class__ = kind
    return made
