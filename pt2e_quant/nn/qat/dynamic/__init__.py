"""Layers in training whose input gets a grid of its own in each step. The names of torch.ao.nn.qat.dynamic."""

from ...trained import DynamicLinear as Linear

__all__ = ["Linear"]
