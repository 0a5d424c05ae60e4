"""Published tensors <-> our parameter trees, by the rules of `names`.

Each rule is read in both directions, so a round trip is exact. Arrays are numpy and keep their
dtype. Tensors may be lazy (anything with `shape`, `dtype` and `__array__`); they are then read one
after another.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
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
MAX_PROBLEMS = 20
"""Lines that one error lists."""

_model_shapes = functools.lru_cache(4)(janusflow.param_shapes)  # each call traces the whole model
vae_shapes = functools.lru_cache(4)(vae.param_shapes)


def published_shapes(cfg: ModelConfig) -> dict[str, Any]:
    """Shapes of our tree without `repa_head`, which no published model has."""
    return {part: tree for part, tree in _model_shapes(cfg).items() if part != "repa_head"}


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises one ConvertError that lists the problems; does nothing when there is none."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{what} ({count}):"]
        lines += [f"  - {problem}" for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            lines.append(f"  ... and {len(problems) - MAX_PROBLEMS} more")
        raise ConvertError("\n".join(lines))


def check(
    tensors: Mapping[str, Any],
    rules: list[Rule],
    expected: Any,
    folder: pathlib.PurePath,
    dtype: Any = None,
) -> None:
    """Checks that `from_torch` can read a tree with the shapes `expected`. Reads no values.

    Args: dtype: of the tree; None keeps each tensor's own.
    Raises:
      ConvertError: lists the tensors of the folder that are missing, unknown, of another shape, not
        of floating-point numbers, or (without `dtype`) of another type than the layers before.
    """
    problems = trees.mismatches(to_torch(expected, rules), tensors, folder.name)
    problems += [
        f"{folder.name}/{name}: expected floating-point numbers; got {x.dtype}"
        for name, x in tensors.items()
        if np.dtype(x.dtype) not in FLOATS
    ]
    raise_problems(f"{folder}: the tensors do not fit the config", problems)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(expected).items()}
    for rule in rules if dtype is None else ():
        stack = [rule.name.format(i) for i in range(rule.count(shapes))]
        problems += [
            f"{folder.name}/{name}: expected {tensors[stack[0]].dtype}, as in the layers before; "
            f"got {tensors[name].dtype}"
            for name in stack
            if tensors[name].dtype != tensors[stack[0]].dtype
        ]
    raise_problems(f"{folder}: choose a dtype for the conversion", problems)


def from_torch(
    tensors: Mapping[str, Any], rules: list[Rule], expected: Any, dtype: Any = None
) -> dict[str, Any]:
    """Reads a tree tensor by tensor, after `check`.

    Args: expected: the tree's shapes; dtype: None keeps each tensor's own.
    Raises:
      ConvertError: a tensor with NaN or infinity.
    """
    leaves: dict[str, Any] = {}
    shapes = {path: leaf.shape for path, leaf in trees.flatten(expected).items()}
    for rule in rules:
        ours = LAYOUTS[rule.layout].ours
        for i in range(rule.count(shapes)):
            name = rule.name.format(i)
            tensor = np.asarray(tensors[name])
            if not trees.is_finite(tensor):
                raise ConvertError(
                    f"{name}: {trees.NON_FINITE}: the file is damaged, or its training diverged"
                )
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


def to_torch(tree: Any, rules: list[Rule]) -> dict[str, LazyTensor]:
    """Name -> published tensor of a tree of arrays, or of shapes.

    Nothing is copied before a tensor is asked for.
    """
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
        for i in range(rule.count(shapes))
    }


def _torch_shape(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of one published tensor (one layer of a stack) from our arrays' shapes."""
    probe = np.broadcast_to(np.int8(0), shapes[rule.paths[0]][int(rule.stacked) :])
    first, *rest = LAYOUTS[rule.layout].torch(probe).shape
    return (first * len(rule.paths), *rest)
