"""A released or exported JanusFlow folder -> a model folder.

All is checked first, then moved part by part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save as safetensors_bytes

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import ModelConfig, files
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import configs as hub_configs, names, parts_layout, tensors
from janusflow_jax.hub.source import (
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    log_missing_scale,
    open_vae,
    pop_batch_norm,
    reading_configs,
    save_converted,
)


def convert(
    janusflow: Any,
    vae: Any,
    out: Any,
    *,
    dtype: str = "",
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> ModelConfig:
    """Converts a published JanusFlow and a VAE into the model folder `out`.

    Memory holds the largest part once.

    Args:
      janusflow: folder with config.json, tokenizer and processor files, and safetensors, or one
        that `export` wrote in parts (`parts_layout`).
      vae: folder of diffusers' AutoencoderKL.
      dtype: 'bfloat16' or 'float32'; '' keeps each tensor's own, and an export then returns every
        bit.
      log: receives progress, a line each.
    Raises:
      ConvertError: weights, config files or tensors that do not fit; lists all tensors of a folder.
        Nothing was written.
      DataError: a tokenizer that is missing, or of another model.
      CheckpointError: a JSON file that cannot be read, or `out` exists and `overwrite` is not set,
        is no model folder, or is not apart from what is read.
    """
    model_folder.check_out(out, overwrite, (janusflow, vae))
    model = Source(janusflow)
    if model.json("config.json").get("model_type") == parts_layout.MODEL_TYPE:
        own = model.folder / "vae"
        if files.resolve(vae) != own:
            raise ConvertError(f"vae: expected {own}, which config.json describes; got {vae}")
        return parts_layout.convert(janusflow, out, dtype=dtype, overwrite=overwrite, log=log)
    autoencoder = open_vae(vae)
    pool = model.pop(re.escape(names.TOWER + names.POOL))
    batch_norm = pop_batch_norm(autoencoder)
    with reading_configs(model, autoencoder):
        cfg = hub_configs.model_config_from_hf(
            model.json("config.json"),
            model.json("preprocessor_config.json", default={}),
            autoencoder.json("config.json"),
            batch_norm,
        )
    log_missing_scale(autoencoder, cfg.vae, log)
    log(f"config: {cfg}")
    count = model.json("processor_config.json", default={}).get("num_image_tokens")
    if count not in (None, cfg.num_image_tokens):
        raise ConvertError(
            f"{model.folder / 'processor_config.json'}: num_image_tokens: expected "
            f"{cfg.num_image_tokens}, as the image size says; got {count}"
        )
    chat = chat_format.ChatFormat.load(model.folder, cfg.num_image_tokens)
    chat.check_vocab(cfg.llm.vocab_size)
    rules, vae_rules = names.janusflow_rules(cfg), names.vae_rules(cfg.vae)
    shapes, vae_shapes = tensors.published_shapes(cfg), tensors.vae_shapes(cfg.vae)
    cast = np.dtype(dtype) if dtype else None
    tensors.check(model.tensors, rules, shapes, model.folder, cast)
    tensors.check(autoencoder.tensors, vae_rules, vae_shapes, autoencoder.folder, cast)

    def parts() -> Iterator[tuple[str, Any]]:
        """One part after another, each read when it is asked for."""
        for part in (p for p in cfg.parts if p in shapes):
            log(f"{part} ...")
            own = [r for r in rules if r.paths[0].split("/")[0] == part]
            # No variable holds the tree: it must be freed before the next part is read.
            yield from tensors.from_torch(model.tensors, own, {part: shapes[part]}, cast).items()
        log("vae ...")
        yield "vae", tensors.from_torch(autoencoder.tensors, vae_rules, vae_shapes, cast)

    hub_files = {
        **model.hub_files(),
        VAE_CONFIG_FILE: (autoencoder.folder / "config.json").read_bytes(),
        UNUSED_FILE: safetensors_bytes({n: np.asarray(x) for n, x in pool.items()}),
    }
    sources = {"janusflow": model, "vae": autoencoder}
    save_converted(out, cfg, parts(), sources, hub_files, overwrite)
    return cfg
