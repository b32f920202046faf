"""Operators on QTensors that give their results a grid of their own: one function a family, chosen from a table."""

from .elementwise import add, add_scalar, cat, matmul, multiply, multiply_scalar, on_grid
from .embedding import embedding, embedding_bag
from .explain import explain, using
from .gates import GATES, Gates, Held
from .products import Geometry, Post, Product, Weight
from .recurrent import Layers

__all__ = [
    "GATES",
    "Gates",
    "Geometry",
    "Held",
    "Layers",
    "Post",
    "Product",
    "Weight",
    "add",
    "add_scalar",
    "cat",
    "embedding",
    "embedding_bag",
    "explain",
    "matmul",
    "multiply",
    "multiply_scalar",
    "on_grid",
    "using",
]
