"""Tensors of a vision tower in the form that a tower of fixed image size has."""

from __future__ import annotations

import math

import jax
import numpy as np
from jaxtyping import Float

from janusflow_jax.hub.safetensors import LazyTensor

COLORS = 3


def to_convolution(tensors: dict[str, LazyTensor], name: str) -> None:
    """Gives SigLIP 2's NaFlex patch embedding, a linear layer, the shape of a convolution.

    Its columns are (row, column, color) of a patch. A convolution stays as it is.
    """
    linear = tensors[name]
    if len(linear.shape) != 2:
        return
    width, columns = linear.shape
    patch = math.isqrt(columns // COLORS)
    if COLORS * patch**2 != columns:
        return  # the check of the shapes names it

    def load() -> np.ndarray:
        return np.asarray(linear).reshape(width, patch, patch, COLORS).transpose(0, 3, 1, 2)

    tensors[name] = LazyTensor((width, COLORS, patch, patch), linear.dtype, load)


def resize_positions(tensors: dict[str, LazyTensor], name: str, old: int, new: int) -> None:
    """Resizes a table of `old` position embeddings to `new`, both of square images."""
    table = tensors[name]
    if table.shape[-2:-1] != (old,):
        return  # the check of the shapes names it
    shape = (*table.shape[:-2], new, table.shape[-1])

    def load() -> np.ndarray:
        grid = np.asarray(table, np.float32).reshape(old, shape[-1])
        return resized(grid, math.isqrt(new)).reshape(shape)

    tensors[name] = LazyTensor(shape, table.dtype, load)


def resized(table: Float[np.ndarray, "S D"], side: int) -> Float[np.ndarray, "N D"]:
    """A square grid of embeddings by linear interpolation, as SigLIP 2's NaFlex does it."""
    before, width = math.isqrt(len(table)), table.shape[-1]
    grid = table.reshape(before, before, width)
    out = jax.image.resize(grid, (side, side, width), "linear", antialias=True)
    return np.asarray(out).reshape(side * side, width)
