"""Low-rank adapters of the matmuls in the language model (LoRA, arXiv 2106.09685).

An adapter lies next to its kernel in the tree: `lora_a` [.., D, R], `lora_b` [.., R, F] and
`lora_scale` [..] (alpha / rank). `layers.Linear` adds `scale * (x @ a) @ b` where the tree has
them, so training, sampling and sharding need no code for them; `merge` folds them into the kernels.
`lora_b` starts at zero: before training, an adapted model equals its base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janusflow_jax.config import LORA_TARGETS, LoraConfig, parts

Tree = dict[str, Any]


def add(llm: Tree, cfg: LoraConfig, key: jax.Array) -> Tree:
    """The LLM's parameters (stacked layers) with fresh adapters added."""
    block = dict(llm["layers"]["block"])
    for i, target in enumerate(cfg.targets):
        part = LORA_TARGETS[target]
        kernel = block[part][target]["kernel"]
        layers, width, out = kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, i), (layers, width, cfg.rank), jnp.float32)
        adapter = {
            "lora_a": a * width**-0.5,
            "lora_b": jnp.zeros((layers, cfg.rank, out)),
            parts.LORA_SCALE: jnp.full((layers,), cfg.alpha / cfg.rank),
        }
        block[part] = {**block[part], target: {**block[part][target], **adapter}}
    return {**llm, "layers": {**llm["layers"], "block": block}}


def merge(tree: Any) -> Any:
    """The tree with every adapter added to its kernel, in float32 on the host."""
    if not isinstance(tree, dict):
        return tree
    if "lora_a" not in tree:
        return {name: merge(x) for name, x in tree.items()}
    kernel, a, b, scale = (
        np.asarray(tree[n]).astype(np.float32)
        for n in ("kernel", *parts.LORA_TRAINED, parts.LORA_SCALE)
    )
    rest = {n: x for n, x in tree.items() if not parts.is_lora_path(n)}
    return {**rest, "kernel": kernel + scale[..., None, None] * (a @ b)}
