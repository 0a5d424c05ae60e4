"""Published tensors <-> our parameter trees, by the rules of `names`.

Each rule is read in both directions, so a round trip is exact. Arrays are numpy and keep their
dtype. Tensors may be lazy (anything with `shape`, `dtype` and `__array__`); they are then read one
after another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from janusflow_jax.config import ModelConfig
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub.names import LAYOUTS, Rule
from janusflow_jax.hub.safetensors import LazyTensor
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import trees

FLOATS = {np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_model_shapes = functools.lru_cache(4)(janusflow.param_shapes)  # each call traces the whole model
vae_shapes = functools.lru_cache(4)(vae.param_shapes)


def published_shapes(cfg: ModelConfig) -> dict[str, Any]:
    """Shapes of our tree without `repa_head`, which no published model has."""
    return {part: tree for part, tree in _model_shapes(cfg).items() if part != "repa_head"}


def raise_problems(what: str, problems: Iterable[str]) -> None:
    """Raises one ConvertError that lists every problem, if there is any."""
    if lines := [f"  - {p}" for p in problems]:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConvertError("\n".join([f"{what} ({count}):", *lines]))


def _torch_shape(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of one published tensor (one layer of a stack) from our arrays' shapes."""
    shape = shapes[rule.paths[0]][int(rule.stacked) :]
    probe = np.broadcast_to(np.int8(0), shape)
    first, *rest = LAYOUTS[rule.layout].torch(probe).shape
    return (first * len(rule.paths), *rest)


def torch_shapes(rules: list[Rule], tree: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the published tensors of a tree of arrays (or shapes)."""
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(tree).items()}
    out = {}
    for rule in rules:
        count = shapes[rule.paths[0]][0] if rule.stacked else 1
        out |= {rule.name.format(i): _torch_shape(rule, shapes) for i in range(count)}
    return out


def problems(
    tensors: Mapping[str, Any], rules: list[Rule], expected: Any, dtype: Any = None
) -> list[str]:
    """Why `tensors` cannot become a tree with the shapes `expected`. Reads no values.

    Args: dtype: type that the arrays will be cast to; None keeps each tensor's own.
    """
    shapes = torch_shapes(rules, expected)
    out = [f"missing: {n} {list(s)}" for n, s in shapes.items() if n not in tensors]
    out += [f"unknown: {n} {list(x.shape)}" for n, x in tensors.items() if n not in shapes]
    for name in (n for n in shapes if n in tensors):
        shape, kind = tuple(tensors[name].shape), np.dtype(tensors[name].dtype)
        if shape != shapes[name]:
            out.append(f"shape of {name}: expected {list(shapes[name])}; got {list(shape)}")
        if kind not in FLOATS:
            out.append(f"dtype of {name}: expected floating-point numbers; got {kind}")
    counts = {path: leaf.shape[0] for path, leaf in trees.flatten(expected).items()}
    for rule in rules if dtype is None else ():
        if rule.stacked:
            layers = [rule.name.format(i) for i in range(counts[rule.paths[0]])]
            kinds = sorted({str(np.dtype(tensors[n].dtype)) for n in layers if n in tensors})
            if len(kinds) > 1:  # our array of all layers has one dtype
                out.append(
                    f"dtype of {rule.name}: expected the same in all layers; got {kinds}: choose "
                    "one for the conversion"
                )
    return out


def from_torch(
    tensors: Mapping[str, Any], rules: list[Rule], expected: Any, dtype: Any = None
) -> dict[str, Any]:
    """Reads a tree tensor by tensor. `problems` must have returned none, unknown tensors apart.

    Args: expected: the tree's shapes; dtype: None keeps each tensor's own.
    """
    leaves: dict[str, Any] = {}
    shapes = {path: leaf.shape for path, leaf in trees.flatten(expected).items()}
    for rule in rules:
        ours = LAYOUTS[rule.layout].ours
        for i in range(shapes[rule.paths[0]][0] if rule.stacked else 1):
            tensor = np.asarray(tensors[rule.name.format(i)])
            for path, piece in zip(rule.paths, np.split(tensor, len(rule.paths)), strict=True):
                if path not in leaves:
                    leaves[path] = np.empty(shapes[path], dtype or tensor.dtype)
                _copy(leaves[path][i] if rule.stacked else leaves[path], ours(piece))
    return trees.unflatten(leaves)


def _copy(out: np.ndarray, x: np.ndarray, columns: int = 128) -> None:
    """out[...] = x. A matrix, which may be transposed, goes in strips that fit the CPU's cache."""
    if x.ndim != 2:
        out[...] = x
        return
    for at in range(0, x.shape[1], columns):
        out[:, at : at + columns] = x[:, at : at + columns]


def to_torch(tree: Any, rules: list[Rule], expected: Any, what: str) -> dict[str, LazyTensor]:
    """Name -> published tensor. Nothing is copied before a tensor is asked for.

    Raises:
      ConvertError: every missing, unknown and misshaped parameter.
    """
    mismatches = trees.mismatches(expected, tree, what)
    raise_problems(f"{what}: the parameters do not fit the config", mismatches)
    leaves = trees.flatten(tree)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}

    def tensor(rule: Rule, layer: int) -> np.ndarray:
        arrays = [np.asarray(leaves[path]) for path in rule.paths]
        torch = LAYOUTS[rule.layout].torch
        pieces = [torch(a[layer] if rule.stacked else a) for a in arrays]
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    return {
        rule.name.format(i): LazyTensor(
            _torch_shape(rule, shapes),
            np.dtype(leaves[rule.paths[0]].dtype),
            functools.partial(tensor, rule, i),
        )
        for rule in rules
        for i in range(shapes[rule.paths[0]][0] if rule.stacked else 1)
    }
