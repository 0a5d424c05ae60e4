"""Low-rank adapters of the language model's matmuls (LoRA, arXiv 2106.09685).

An adapter stands beside its kernel in the tree: `lora_a` [.., D, R], `lora_b` [.., R, F] and
`lora_scale` [..] (alpha / rank). `layers.Linear` adds `scale * (x @ a) @ b` where it finds them, so
training, sampling and sharding know nothing of them; `merge` folds them into the kernels. `lora_b`
begins at zero: an adapted model is the model itself until it is trained.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janusflow_jax.config import LORA_TARGETS, LoraConfig

Tree = dict[str, Any]
TRAINED = ("lora_a", "lora_b")
SCALE = "lora_scale"
BLOCK = "llm/layers/block"


def paths(cfg: LoraConfig) -> tuple[str, ...]:
    """The leaves that training moves; none where there is no LoRA."""
    if not cfg.rank:
        return ()
    return tuple(f"{BLOCK}/{LORA_TARGETS[t]}/{t}/{leaf}" for t in cfg.targets for leaf in TRAINED)


def is_path(name: str) -> bool:
    """Whether a leaf is an adapter's."""
    return name.rpartition("/")[2] in (*TRAINED, SCALE)


def add(llm: Tree, cfg: LoraConfig, key: jax.Array) -> Tree:
    """The LLM's tree with fresh adapters (stacked layers); what is there stays as it is."""
    block = dict(llm["layers"]["block"])
    for i, target in enumerate(cfg.targets):
        part = LORA_TARGETS[target]
        kernel = block[part][target]["kernel"]
        layers, width, out = kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, i), (layers, width, cfg.rank)) * width**-0.5
        adapter = {
            "lora_a": a,
            "lora_b": jnp.zeros((layers, cfg.rank, out)),
            SCALE: jnp.full((layers,), cfg.alpha / cfg.rank),
        }
        block[part] = {**block[part], target: {**block[part][target], **adapter}}
    return {**llm, "layers": {**llm["layers"], "block": block}}


def merge(tree: Any) -> Any:
    """The tree with every adapter added to its kernel, in float32 on the host; others untouched."""
    if not isinstance(tree, dict):
        return tree
    if "lora_a" not in tree:
        return {name: merge(x) for name, x in tree.items()}
    kernel, a, b, scale = (
        np.asarray(tree[n]).astype(np.float32) for n in ("kernel", *TRAINED, SCALE)
    )
    rest = {n: x for n, x in tree.items() if not is_path(n)}
    return {**rest, "kernel": kernel + scale[..., None, None] * (a @ b)}
