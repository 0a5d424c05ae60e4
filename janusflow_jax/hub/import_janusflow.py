"""A published JanusFlow folder -> a model folder. All is checked first, then moved part by part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save as safetensors_bytes

from janusflow_jax.config import MODEL_PARTS, ModelConfig
from janusflow_jax.config.errors import DataError
from janusflow_jax.hub import configs as hub_configs, names, tensors
from janusflow_jax.hub.source import (
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    license_files,
    load_chat_format,
    open_vae,
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

    Args:
      janusflow: folder with config.json, tokenizer and processor files, and safetensors.
      vae: folder of diffusers' AutoencoderKL.
      dtype: 'bfloat16' or 'float32'; '' keeps each tensor's own, and an export then returns every
        bit.
      log: receives progress and notes, a line each.
    Raises:
      ConvertError: everything that is wrong with the folders; nothing was written.
      CheckpointError: `out` exists and `overwrite` is not set.
    """
    model, autoencoder = Source(janusflow, "janusflow"), open_vae(vae)
    pool = model.pop(re.escape(names.TOWER + names.POOL))
    preprocessor, processor = (
        model.json("preprocessor_config.json"),
        model.json("processor_config.json"),
    )
    problems, notes = model.problems + autoencoder.problems, model.notes + autoencoder.notes
    cast = np.dtype(dtype) if dtype else None
    cfg = None
    if model.right_kind and autoencoder.right_kind:
        cfg = hub_configs.model_config_from_hf(
            model.config, preprocessor, autoencoder.config, problems, notes
        )
    if cfg is not None:
        log(f"config: {cfg}")
        problems += model.misfits(names.janusflow_rules(cfg), tensors.published_shapes(cfg), cast)
        problems += autoencoder.misfits(names.vae_rules(cfg.vae), tensors.vae_shapes(cfg.vae), cast)
        problems += _text_problems(model.folder, processor, cfg)
    for note in notes:
        log(f"note: {note}")
    tensors.raise_problems(f"{model.folder}: cannot be converted", problems)
    assert cfg is not None
    if not pool:
        log("note: the weights have no pooling head; an export will have none")
    hub_files = {
        **model.hub_files(),
        VAE_CONFIG_FILE: (autoencoder.folder / "config.json").read_bytes(),
        UNUSED_FILE: safetensors_bytes({n: np.asarray(x) for n, x in pool.items()}),
        **license_files([(model, ""), (autoencoder, "vae.")]),
    }
    parts = _parts(model, autoencoder, cfg, cast, log)
    save_converted(out, cfg, parts, (model, autoencoder), hub_files, {}, overwrite)
    return cfg


def _text_problems(folder: epath.Path, processor: dict[str, Any], cfg: ModelConfig) -> list[str]:
    problems: list[str] = []
    chat = load_chat_format(folder, cfg.num_image_tokens, problems)
    if chat is not None:
        try:
            chat.check_vocab(cfg.llm.vocab_size)
        except DataError as error:
            problems.append(str(error))
    count = processor.get("num_image_tokens", cfg.num_image_tokens)
    if count != cfg.num_image_tokens:
        problems.append(
            f"{folder / 'processor_config.json'}: num_image_tokens: expected "
            f"{cfg.num_image_tokens} (image_size {cfg.image_size}); got {count}"
        )
    return problems


def _parts(
    model: Source, autoencoder: Source, cfg: ModelConfig, dtype: Any, log: Callable[[str], None]
) -> Iterator[tuple[str, Any]]:
    """One part after another, each read when it is asked for."""
    rules, shapes = names.janusflow_rules(cfg), tensors.published_shapes(cfg)
    for part in (p for p in MODEL_PARTS if p in shapes):
        log(f"{part} ...")
        own = [r for r in rules if r.paths[0].split("/")[0] == part]
        # No variable holds the tree here: it must be freed before the next part is read.
        yield part, tensors.from_torch(model.tensors, own, {part: shapes[part]}, dtype)[part]
    log("vae ...")
    yield (
        "vae",
        tensors.from_torch(
            autoencoder.tensors, names.vae_rules(cfg.vae), tensors.vae_shapes(cfg.vae), dtype
        ),
    )
