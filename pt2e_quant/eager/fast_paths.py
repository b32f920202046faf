"""Weights that torch's attention and transformer layers read past `forward` of their children."""

from __future__ import annotations

from torch import nn

__all__ = ["close_fast_paths", "reader_of_child"]


def reader_of_child(parent: nn.Module, name: str) -> str | None:
    """Why a child must keep its float weight; None where it need not."""
    if type(parent).forward is nn.MultiheadAttention.forward and name == "out_proj":
        return "MultiheadAttention computes with its weight and never calls it"
    return None


def close_fast_paths(model: nn.Module) -> None:
    """Let transformer layers call what was observed or quantized in them; torch's fused kernel reads float weights."""
    closed = False
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and not _is_float(layer):
            layer.activation_relu_or_gelu = 0  # what torch's forward asks before it takes the fused kernel
            closed = True
    for stack in model.modules():
        if closed and isinstance(stack, nn.TransformerEncoder):
            stack.use_nested_tensor = False  # reads the weights of its first layer


def _is_float(layer: nn.TransformerEncoderLayer) -> bool:
    plain = type(layer.self_attn) is nn.MultiheadAttention and not _is_observed(layer)
    return plain and isinstance(layer.linear1, nn.Linear) and isinstance(layer.linear2, nn.Linear)


def _is_observed(layer: nn.Module) -> bool:
    """Whether something inside has an observer."""
    return any(name.endswith("activation_post_process") for name, _ in layer.named_modules())
