"""Published checkpoints <-> our trees, by the rules of `torch_names`.

One table is read in both directions, so a round trip is exact. Arrays are numpy and keep their type
(also ml_dtypes' bfloat16); torch is never imported. Tensors may be lazy (anything with `shape`,
`dtype` and `__array__`): they are then read one after another, and no copy of the whole is made.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from janusflow_jax.config import ModelConfig, SiglipConfig, VaeConfig
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub import names as tensor_names
from janusflow_jax.hub.names import LAYOUTS, Rule
from janusflow_jax.hub.safetensors import Made
from janusflow_jax.models import janusflow, vae

Tensors = Mapping[str, Any]
FLOATS = {np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}


def numpy_dtype(name: str) -> np.dtype:
    """A type by numpy's or ml_dtypes' name."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def janusflow_rules(cfg: ModelConfig) -> list[Rule]:
    """The table for the JanusFlow checkpoint: every name but the unused pooling head's."""
    return tensor_names.janusflow_rules(cfg)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested dict as ('llm/head/kernel', leaf) pairs."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _torch_shape(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of one published tensor (one layer of a stack) from our arrays' shapes."""
    shape = shapes[rule.paths[0]][int(rule.stacked) :]
    probe = np.broadcast_to(np.int8(0), shape)
    first, *rest = LAYOUTS[rule.layout].torch(probe).shape if shape else shape
    return (first * len(rule.paths), *rest)


def torch_shapes(rules: list[Rule], tree: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every published tensor that a tree of arrays (or shapes) stands for."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(tree)}
    out = {}
    for rule in rules:
        shape = _torch_shape(rule, shapes)
        count = shapes[rule.paths[0]][0] if rule.stacked else 1
        out |= {rule.name.format(i): shape for i in range(count)}
    return out


def raise_problems(what: str, problems: list[str]) -> None:
    """Raises one ConvertError that lists every problem; does nothing when there is none."""
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise ConvertError(f"{what} ({len(problems)} problems):\n{lines}")


def shape_problems(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every missing, unknown and misshaped tensor, and those that hold no floats."""
    problems = [f"missing: {n} {list(s)}" for n, s in wanted.items() if n not in tensors]
    problems += [f"unknown: {n} {list(x.shape)}" for n, x in tensors.items() if n not in wanted]
    for name in (n for n in wanted if n in tensors):
        shape, dtype = tuple(tensors[name].shape), np.dtype(tensors[name].dtype)
        if shape != wanted[name]:
            problems.append(f"shape of {name}: expected {list(wanted[name])}; got {list(shape)}")
        if dtype not in FLOATS:
            problems.append(f"type of {name}: expected floating-point numbers; got {dtype}")
    return problems


def problems(tensors: Tensors, rules: list[Rule], expected: Any, dtype: Any = None) -> list[str]:
    """Why tensors cannot become a tree of the shapes `expected`; reads no values.

    Args: dtype: what the arrays will be cast to; None: nothing, so a stack is of one type.
    """
    found = shape_problems(tensors, torch_shapes(rules, expected))
    counts = {path: leaf.shape[0] for path, leaf in flatten(expected) if leaf.shape}
    for rule in rules if dtype is None else ():
        names = [rule.name.format(i) for i in range(counts[rule.paths[0]] if rule.stacked else 1)]
        kinds = sorted({str(np.dtype(tensors[n].dtype)) for n in names if n in tensors})
        if len(kinds) > 1:
            found.append(
                f"type of {rule.name}: expected one type in all layers; got {kinds}: name one "
                "(--dtype)"
            )
    return found


def from_torch(
    tensors: Tensors, rules: list[Rule], expected: Any, dtype: Any = None
) -> dict[str, Any]:
    """Reads a tree tensor by tensor; `problems` must have found none.

    Args: tensors: may hold others too; expected: the tree's shapes; dtype: None keeps each type.
    """
    leaves: dict[str, Any] = {}
    shapes = {path: leaf.shape for path, leaf in flatten(expected)}
    for rule in rules:
        ours = LAYOUTS[rule.layout].ours
        for i in range(shapes[rule.paths[0]][0] if rule.stacked else 1):
            tensor = np.asarray(tensors[rule.name.format(i)])
            for path, piece in zip(rule.paths, np.split(tensor, len(rule.paths)), strict=True):
                if path not in leaves:
                    leaves[path] = np.empty(shapes[path], dtype or tensor.dtype)
                _copy(leaves[path][i] if rule.stacked else leaves[path], ours(piece))
    return unflatten(leaves)


def _copy(out: np.ndarray, x: np.ndarray, columns: int = 128) -> None:
    """out[...] = x; a transposed matrix in strips, so that what is read stays in the cache."""
    if x.ndim != 2:
        out[...] = x
        return
    for at in range(0, x.shape[1], columns):
        out[:, at : at + columns] = x[:, at : at + columns]


def to_torch(tree: Any, rules: list[Rule], expected: Any, what: str) -> dict[str, Made]:
    """Name -> the published tensor, not made yet: nothing is copied before `make` is called.

    Raises:
      ConvertError: every missing, unknown and misshaped parameter.
    """
    leaves = dict(flatten(tree))
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(expected)}
    found = [f"missing: {p} {list(s)}" for p, s in wanted.items() if p not in leaves]
    found += [f"unknown: {p} {list(x.shape)}" for p, x in leaves.items() if p not in wanted]
    found += [
        f"shape of {p}: expected {list(s)}; got {list(leaves[p].shape)}"
        for p, s in wanted.items()
        if p in leaves and tuple(leaves[p].shape) != s
    ]
    raise_problems(f"{what}: the parameters do not fit the config", found)

    def make(rule: Rule, layer: int) -> Callable[[], np.ndarray]:
        def tensor() -> np.ndarray:
            arrays = [np.asarray(leaves[path]) for path in rule.paths]
            torch = LAYOUTS[rule.layout].torch
            parts = [torch(a[layer] if rule.stacked else a) for a in arrays]
            return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])

        return tensor

    return {
        rule.name.format(i): Made(
            _torch_shape(rule, wanted), np.dtype(leaves[rule.paths[0]].dtype), make(rule, i)
        )
        for rule in rules
        for i in range(wanted[rule.paths[0]][0] if rule.stacked else 1)
    }


def split_pool(tensors: Tensors, prefix: str = tensor_names.TOWER) -> tuple[Tensors, Tensors]:
    """(tensors without the pooling head's, the pooling head's)."""
    pool = re.compile(re.escape(prefix + tensor_names.POOL))
    return (
        {n: x for n, x in tensors.items() if not pool.match(n)},
        {n: x for n, x in tensors.items() if pool.match(n)},
    )


def pool_problems(pool: Tensors, cfg: SiglipConfig, prefix: str = tensor_names.TOWER) -> list[str]:
    """A pooling head is there in whole or not at all."""
    return shape_problems(pool, tensor_names.pool_shapes(cfg, prefix)) if pool else []


_model_shapes = functools.lru_cache(4)(janusflow.param_shapes)  # a trace of the whole model each
_vae_shapes = functools.lru_cache(4)(vae.param_shapes)


def published_shapes(cfg: ModelConfig) -> dict[str, Any]:
    """Our tree's shapes without `repa_head`, which only training has."""
    return {n: part for n, part in _model_shapes(cfg).items() if n != "repa_head"}


def rules_of(rules: list[Rule], part: str) -> list[Rule]:
    """The rules that make one part of the tree."""
    return [r for r in rules if r.paths[0].split("/")[0] == part]


def _checked(tensors: Tensors, rules: list[Rule], expected: Any, what: str) -> dict[str, Any]:
    hint = "compare the config files with the tensors; they must be of the same model"
    found = problems(tensors, rules, expected)
    raise_problems(f"{what}: the tensors do not fit the config; {hint}", found)
    return from_torch(tensors, rules, expected)


def janusflow_problems(tensors: Tensors, cfg: ModelConfig, dtype: Any = None) -> list[str]:
    """Why tensors are no JanusFlow of this config; the pooling head counts too."""
    used, pool = split_pool(tensors)
    found = problems(used, janusflow_rules(cfg), published_shapes(cfg), dtype)
    return found + pool_problems(pool, cfg.und)


def janusflow_from_torch(
    tensors: Tensors, cfg: ModelConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The published checkpoint's tensors -> (our tree without `repa_head`, unused tensors).

    Raises:
      ConvertError: every missing, unknown and misshaped tensor.
    """
    hint = "compare the config files with the tensors; they must be of the same model"
    found = janusflow_problems(tensors, cfg)
    raise_problems(f"JanusFlow: the tensors do not fit the config; {hint}", found)
    used, pool = split_pool(tensors)
    tree = from_torch(used, janusflow_rules(cfg), published_shapes(cfg))
    return tree, {n: np.asarray(x) for n, x in pool.items()}


def janusflow_to_torch(
    params: Mapping[str, Any], unused: Tensors, cfg: ModelConfig
) -> dict[str, np.ndarray]:
    """Our tree -> published names. `repa_head` (training only) is left out; `unused` comes back.

    Raises:
      ConvertError: every missing, unknown and misshaped parameter.
    """
    made = lazy_janusflow(params, cfg)
    return {n: x.make() for n, x in made.items()} | {n: np.asarray(x) for n, x in unused.items()}


def lazy_janusflow(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Made]:
    """`to_torch` of a JanusFlow tree, without `repa_head`."""
    params = {n: part for n, part in params.items() if n != "repa_head"}
    return to_torch(params, janusflow_rules(cfg), published_shapes(cfg), "JanusFlow")


def vae_names(tensors: Tensors) -> Tensors:
    """A VAE's tensors under diffusers' names of today (its attention's changed in 0.17)."""
    old = re.compile(r"(mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.")
    new = tensor_names.OLD_VAE_NAMES
    return {old.sub(lambda m: f"{m[1]}.{new[m[2]]}.", n): x for n, x in tensors.items()}


def vae_problems(tensors: Tensors, cfg: VaeConfig, dtype: Any = None) -> list[str]:
    """Why tensors are no AutoencoderKL of this config."""
    expected = _vae_shapes(cfg)
    found = problems(vae_names(tensors), tensor_names.vae_rules(cfg), expected, dtype)
    doubled = len(tensors) - len(vae_names(tensors))
    return found + ([f"duplicate: {doubled} tensors have an old and a new name"] if doubled else [])


def vae_from_torch(tensors: Tensors, cfg: VaeConfig, dtype: Any = None) -> dict[str, Any]:
    """diffusers' AutoencoderKL -> our tree; also with its attention's names before 0.17.

    Raises:
      ConvertError: every missing, unknown and misshaped tensor.
    """
    found = vae_problems(tensors, cfg, dtype)
    raise_problems("VAE: the tensors do not fit the config", found)
    expected = _vae_shapes(cfg)
    return from_torch(vae_names(tensors), tensor_names.vae_rules(cfg), expected, dtype)


def lazy_vae(params: Mapping[str, Any], cfg: VaeConfig) -> dict[str, Made]:
    """`to_torch` of a VAE's tree."""
    return to_torch(params, tensor_names.vae_rules(cfg), _vae_shapes(cfg), "VAE")


def vae_to_torch(params: Mapping[str, Any], cfg: VaeConfig) -> dict[str, np.ndarray]:
    """Our VAE tree -> diffusers' names."""
    return {n: x.make() for n, x in lazy_vae(params, cfg).items()}


def repa_from_torch(tensors: Tensors, cfg: ModelConfig) -> dict[str, Any]:
    """`repa_head.{0,2,4}` -> our `repa_head` tree (the golden numbers' names)."""
    expected = janusflow.param_shapes(cfg)["repa_head"]
    return _checked(tensors, tensor_names.repa_rules(), expected, "REPA head")


def repa_to_torch(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `repa_from_torch`."""
    expected = janusflow.param_shapes(cfg)["repa_head"]
    made = to_torch(params, tensor_names.repa_rules(), expected, "REPA head")
    return {n: x.make() for n, x in made.items()}
