"""The held-out losses of a training run, measured for any model."""

from __future__ import annotations

import copy
from typing import Any

import jax

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import TrainConfig, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, ConfigError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import adapters
from janusflow_jax.models import attention
from janusflow_jax.parallel import sharding
from janusflow_jax.training import heldout


def measure(
    path: str,
    cfg: TrainConfig,
    weights: str = "ema",
    dtype: str | None = None,
    adapter: str = "",
) -> dict[str, float]:
    """Held-out losses of a model on the sources of `cfg.evaluate`, such as 'paint_unseen/loss_rf'.

    Rows, noise, times, row length and slots come from the config; the sizes and the tokenizer come
    from the model.

    Args:
      weights: 'ema' or 'params', of a training run.
      dtype: of activations; None: the config's.
      adapter: a folder of `tools/export_checkpoint.py --adapter-only`.
    Raises:
      ConfigError: a config without held-out sources.
      CheckpointError: no model, or one without a part that a source's loss needs.
      ConvertError: adapters of another base, or none.
    """
    if not cfg.evaluate.sources:
        raise ConfigError(
            f"config {cfg.name!r}: expected evaluate.sources to measure on; got none "
            "(see Held-out losses in docs/training.md)"
        )
    cfg = copy.deepcopy(cfg)
    cfg.dtype = dtype or cfg.dtype
    attention.check_here(cfg)
    loaded = model_folder.load_model(path, weights=weights)
    tasks = {s.task for s in cfg.evaluate.sources}
    needed = {part for task in tasks for part in parts_lib.needed_for(task, loaded.cfg)}
    needed |= {"vae"} if "generate" in tasks else set()
    if missing := sorted(needed - {*loaded.parts}):
        raise CheckpointError(
            f"{path}: held-out losses of {sorted(tasks)} need the parts {missing}; it has "
            f"{loaded.parts}"
        )
    params = loaded.params or {}
    if adapter:
        params = {**params, "llm": adapters.apply(params.get("llm"), adapter)}
    cfg.model = loaded.cfg
    cfg.mesh = config_lib.MeshConfig()
    chat = chat_format.ChatFormat.load(loaded.hub, num_image_tokens=cfg.model.num_image_tokens)
    mesh = sharding.make_mesh(cfg.mesh)
    trees: Any = (params, loaded.vae or {})
    with jax.set_mesh(mesh):
        params, vae = sharding.put_tree(trees, sharding.tree_shardings(trees, mesh))
        state = {"params": params, "frozen": {}, "vae": vae, "ema": {}}
        values = heldout.Heldout(cfg, mesh, chat).measure(state)
    return {name.removeprefix(f"{heldout.RAW}/"): value for name, value in values.items()}
