"""Published tensors <-> trees in memory, checked: what conversion does, without folders."""

import pathlib
from typing import Any

import numpy as np

from janusflow_jax.config import ModelConfig, VaeConfig
from janusflow_jax.hub import names, tensors
from janusflow_jax.models import janusflow

REPA = [
    rule
    for i in range(3)
    for rule in (
        names.Rule(f"repa_head.{2 * i}.weight", (f"linear_{i}/kernel",), "linear"),
        names.Rule(f"repa_head.{2 * i}.bias", (f"linear_{i}/bias",)),
    )
]
"""The REPA head's names in the golden numbers; no published model has one."""


def is_pool(name: str) -> bool:
    return name.startswith(names.TOWER + names.POOL)


def _from_torch(published: dict[str, np.ndarray], rules: list[names.Rule], shapes: Any) -> Any:
    tensors.check(published, rules, shapes, pathlib.PurePath("published"))
    return tensors.from_torch(published, rules, shapes)


def _to_torch(tree: Any, rules: list[names.Rule]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in tensors.to_torch(tree, rules).items()}


def janusflow_from_torch(published: dict[str, np.ndarray], cfg: ModelConfig) -> dict[str, Any]:
    """The model's tree without `repa_head`; the pooling head is left out."""
    used = {name: x for name, x in published.items() if not is_pool(name)}
    return _from_torch(used, names.janusflow_rules(cfg), tensors.published_shapes(cfg))


def janusflow_to_torch(params: dict[str, Any], cfg: ModelConfig) -> dict[str, np.ndarray]:
    return _to_torch(params, names.janusflow_rules(cfg))


def vae_from_torch(published: dict[str, np.ndarray], cfg: VaeConfig) -> dict[str, Any]:
    return _from_torch(published, names.vae_rules(cfg), tensors.vae_shapes(cfg))


def vae_to_torch(params: dict[str, Any], cfg: VaeConfig) -> dict[str, np.ndarray]:
    return _to_torch(params, names.vae_rules(cfg))


def repa_from_torch(published: dict[str, np.ndarray], cfg: ModelConfig) -> dict[str, Any]:
    return _from_torch(published, REPA, janusflow.param_shapes(cfg)["repa_head"])


def repa_to_torch(params: dict[str, Any]) -> dict[str, np.ndarray]:
    return _to_torch(params, REPA)
