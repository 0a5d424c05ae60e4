"""Nested dicts of arrays by their paths: 'llm/layers/block/attn/q/kernel'."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

Tree = dict[str, Any]
NON_FINITE = "expected finite numbers; got NaN or infinity"
_PIECE = 1 << 18  # values that fit the CPU's cache


def path_name(path: Any) -> str:
    """A path of JAX's tree functions as 'llm/layers/block/attn/q/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path; works for any pytree."""
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(leaves: dict[str, Any]) -> Tree:
    """The inverse of `flatten` for nested dicts."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def mismatches(expected: Any, got: Any, where: str) -> list[str]:
    """One line for each array of `got` that is missing, unknown or of another shape."""
    want, have = ({n: tuple(x.shape) for n, x in flatten(t).items()} for t in (expected, got))
    lines = []
    for name in sorted({*want, *have}):
        if name not in have:
            lines.append(f"{where}/{name}: missing; expected shape {want[name]}")
        elif name not in want:
            lines.append(f"{where}/{name}: unknown; its shape is {have[name]}")
        elif want[name] != have[name]:
            lines.append(f"{where}/{name}: expected shape {want[name]}; got {have[name]}")
    return lines


def is_finite(x: np.ndarray) -> bool:
    """Whether an array on the host holds no NaN and no infinity; needs almost no memory."""
    values = np.ravel(x, order="K")
    pieces = (values[at : at + _PIECE] for at in range(0, values.size, _PIECE))
    if values.dtype == ml_dtypes.bfloat16:  # NumPy's own test of it takes eight times as long
        return all(np.max(p.view(np.uint16) & 0x7FFF) < 0x7F80 for p in pieces)
    return all(np.isfinite(p).all() for p in pieces)


def non_finite(tree: Any) -> list[str]:
    """Names of the arrays that hold NaN or infinity, on the host or in shards on devices."""
    leaves = flatten(tree)
    on_devices = {name: x for name, x in leaves.items() if isinstance(x, jax.Array)}
    finite = jax.device_get(_all_finite(on_devices))
    finite |= {name: is_finite(x) for name, x in leaves.items() if name not in on_devices}
    return [name for name in leaves if not finite[name]]


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.isfinite(x)) for name, x in arrays.items()}


def merge(first: Tree, second: Tree) -> Tree:
    """Both trees in one; where both have a leaf, the second's."""
    out = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def below(name: str, path: str) -> bool:
    """Whether a leaf's name is `path`, or stands below it."""
    return name == path or name.startswith(f"{path}/")


def split(tree: Tree, paths: Iterable[str]) -> tuple[Tree, Tree]:
    """Two trees with disjoint leaves: those below one of `paths`, and the rest."""
    paths = tuple(paths)
    leaves = flatten(tree)
    chosen = {n: x for n, x in leaves.items() if any(below(n, p) for p in paths)}
    return unflatten(chosen), unflatten({n: x for n, x in leaves.items() if n not in chosen})


def digest(tree: Tree) -> str:
    """SHA-256 of the leaves' names, shapes and values as float32."""
    out = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        out.update(f"{name} {tuple(leaf.shape)};".encode())
        out.update(np.ascontiguousarray(leaf, np.float32).data)
    return out.hexdigest()
