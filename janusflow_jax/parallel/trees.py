"""Nested dicts of arrays by their paths: 'llm/layers/block/attn/q/kernel'."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from janusflow_jax.parallel.sharding import path_name

Tree = dict[str, Any]


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path name."""
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(leaves: dict[str, Any]) -> Tree:
    """The inverse of `flat` for nested dicts."""
    out: Tree = {}
    for name, leaf in leaves.items():
        node = out
        *above, last = name.split("/")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


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
    leaves = flat(tree)
    chosen = {n: x for n, x in leaves.items() if any(below(n, p) for p in paths)}
    return nested(chosen), nested({n: x for n, x in leaves.items() if n not in chosen})


def digest(tree: Tree) -> str:
    """SHA-256 of the leaves' names, shapes and values as float32."""
    out = hashlib.sha256()
    for name, leaf in sorted(flat(tree).items()):
        out.update(f"{name} {tuple(leaf.shape)};".encode())
        out.update(np.ascontiguousarray(leaf, np.float32).data)
    return out.hexdigest()
