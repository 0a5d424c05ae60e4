"""A model as a folder of parts, for a model that the released format cannot describe.

    config.json, model.safetensors   the whole ModelConfig, and the parts that only JanusFlow has
    llm/                             the language model and its tokenizer, for transformers
    siglip/                          transformers' SiglipVisionModel
    vae/                             diffusers' AutoencoderKL or AutoencoderKLFlux2

Reading gives the same config and the same bits. docs/open_parts.md describes the layout to users.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from janusflow_jax.config import ModelConfig, from_dict, to_dict
from janusflow_jax.config.errors import ConfigError, ConvertError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import configs as hub_configs, families, names, tensors
from janusflow_jax.hub.safetensors import LazyTensor
from janusflow_jax.hub.source import (
    LICENSES_FILE,
    LLM_CONFIG_FILE,
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    license_files,
    open_vae,
    pop_batch_norm,
    reading_configs,
    save_converted,
)

MODEL_TYPE = "janusflow_jax"
"""`model_type` in config.json."""

FORMAT = 1
FOLDERS = ("llm", "siglip", "vae")
_SIGLIP = "vision_model."  # the prefix that every version of transformers reads
_NOT_COPIED = {
    UNUSED_FILE,
    LLM_CONFIG_FILE,
    VAE_CONFIG_FILE,
    "config.json",
    "preprocessor_config.json",
}


def _rules(cfg: ModelConfig) -> dict[str, list[names.Rule]]:
    """Folder -> rules of its tensors; '' is the top."""
    return {
        "": names.own_rules(cfg),
        "llm": names.llm_rules(cfg.llm),
        "siglip": names.siglip_hf_rules(_SIGLIP),
        "vae": names.vae_rules(cfg.vae),
    }


def _shapes(cfg: ModelConfig) -> dict[str, Any]:
    """Folder -> shapes of the parts that it holds."""
    shapes = tensors.published_shapes(cfg)
    llm, siglip = ({part: shapes.pop(part)} for part in ("llm", "und_encoder"))
    return {"": shapes, "llm": llm, "siglip": siglip, "vae": tensors.vae_shapes(cfg.vae)}


def to_tensors(cfg: ModelConfig, params: Any, vae: Any) -> dict[str, dict[str, LazyTensor]]:
    """Folder -> its tensors by name."""
    rules = _rules(cfg)
    return {
        folder: tensors.to_torch(vae if folder == "vae" else params, of_folder)
        for folder, of_folder in rules.items()
    }


def batch_norm_tensors(cfg: ModelConfig, vae_config: bytes) -> dict[str, LazyTensor]:
    """FLUX.2's buffers, float32 whatever the weights are; the count of batches is 0."""
    buffers: dict[str, Any] = hub_configs.flux2_batch_norm(cfg.vae, json.loads(vae_config))
    if buffers:
        buffers["num_batches_tracked"] = np.zeros((), np.int64)
    return {
        f"bn.{name}": LazyTensor(x.shape, x.dtype, lambda x=x: x) for name, x in buffers.items()
    }


def config_files(
    cfg: ModelConfig,
    hub: Mapping[str, bytes],
    dtypes: Mapping[str, str],
    tokens: Mapping[str, int],
) -> dict[str, bytes]:
    """Path in the folder -> content, of everything but weights and the model card.

    Args:
      hub: the model folder's `hub/`.
      dtypes: folder -> dtype of its weights.
      tokens: ids of special tokens, for the language model's config.json if it has none.
    Raises:
      ConvertError: the config files would describe another model.
    """
    llm_extra = {**tokens, **json.loads(hub.get(LLM_CONFIG_FILE, b"{}"))}
    architecture = families.FAMILIES[cfg.llm.family].architecture
    values = {
        "config.json": {
            "model_type": MODEL_TYPE,
            "architectures": ["JanusFlow"],
            "format": FORMAT,
            "model": to_dict(cfg),
        },
        "llm/config.json": families.config_to_hf(cfg.llm, llm_extra)
        | {
            "architectures": [architecture],
            "torch_dtype": dtypes["llm"],
        },
        "siglip/config.json": hub_configs.siglip_vision_config_to_hf(cfg.und)
        | {"torch_dtype": dtypes["siglip"]},
    }
    out = {name: to_json(value) for name, value in values.items()}
    out["vae/config.json"] = _vae_config(cfg, hub.get(VAE_CONFIG_FILE, b""))
    copied = {path_of(name): data for name, data in hub.items() if name not in _NOT_COPIED}
    return copied | out


def path_of(name: str) -> str:
    """Where a file of `hub/` is: a license 'vae.LICENSE' in `vae/`, tokenizer files in `llm/`."""
    if name == LICENSES_FILE:
        return name
    part, _, rest = name.partition(".")
    return f"{part}/{rest}" if part in FOLDERS and rest else f"llm/{name}"


def _vae_config(cfg: ModelConfig, source: bytes) -> bytes:
    """The VAE's config.json: the source's if it still describes this model."""
    written = {**hub_configs.vae_config_to_hf(cfg.vae), "sample_size": cfg.image_size}
    for data in (source, to_json(written)):
        values = json.loads(data or b"{}")
        if values and _describes_vae(cfg, values):
            return data
    raise ConvertError(f"{cfg.name}: diffusers' config.json cannot describe model.vae: {cfg.vae}")


def _describes_vae(cfg: ModelConfig, values: dict[str, Any]) -> bool:
    batch_norm = hub_configs.flux2_batch_norm(cfg.vae, values)
    return hub_configs.vae_config_from_hf(values, batch_norm) == cfg.vae


def to_json(value: Any) -> bytes:
    """As published config files are written."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def convert(
    folder: Any,
    out: Any,
    *,
    dtype: str = "",
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> ModelConfig:
    """The inverse of an export: a folder of parts -> the model folder `out`.

    Args and errors: those of `import_janusflow.convert`.
    """
    main = Source(folder)
    sources = {name: Source(main.folder / name) for name in ("llm", "siglip")}
    sources["vae"] = open_vae(main.folder / "vae")
    sources[""] = main
    cfg = _read_config(sources)
    log(f"config: {cfg}")
    chat = chat_format.ChatFormat.load(sources["llm"].folder, cfg.num_image_tokens)
    chat.check_vocab(cfg.llm.vocab_size)
    rules, shapes = _rules(cfg), _shapes(cfg)
    cast = np.dtype(dtype) if dtype else None
    for name, source in sources.items():
        tensors.check(source.tensors, rules[name], shapes[name], source.folder, cast)

    def parts() -> Iterator[tuple[str, Any]]:
        """One part after another, each read when it is asked for."""
        for name in ("llm", "siglip", ""):
            for part, tree in shapes[name].items():
                log(f"{part} ...")
                own = [r for r in rules[name] if r.paths[0].split("/")[0] == part]
                of_folder = sources[name].tensors
                yield from tensors.from_torch(of_folder, own, {part: tree}, cast).items()
        log("vae ...")
        yield "vae", tensors.from_torch(sources["vae"].tensors, rules["vae"], shapes["vae"], cast)

    licensed = {name: sources[name] for name in FOLDERS}
    hub_files = sources["llm"].hub_files()
    hub_files[LLM_CONFIG_FILE] = hub_files.pop("config.json")
    hub_files[VAE_CONFIG_FILE] = (sources["vae"].folder / "config.json").read_bytes()
    licenses = license_files(licensed)
    if (main.folder / LICENSES_FILE).exists():
        licenses[LICENSES_FILE] = (main.folder / LICENSES_FILE).read_bytes()
    named = {name or "janusflow": source for name, source in sources.items()}
    save_converted(out, cfg, parts(), named, hub_files, overwrite, licenses)
    return cfg


def _read_config(sources: Mapping[str, Source]) -> ModelConfig:
    """The model, as config.json and the parts' own files both describe it."""
    main = sources[""]
    file = main.folder / "config.json"
    values = main.json("config.json")
    if values.get("format") != FORMAT:
        raise ConvertError(
            f"{file}: expected format {FORMAT}; got {values.get('format')!r}: written by another "
            "version of janusflow_jax"
        )
    batch_norm = pop_batch_norm(sources["vae"])
    with reading_configs(*sources.values()):
        model = hub_configs.json_object(str(file), values, "model")
        try:
            cfg = from_dict(ModelConfig, model)
        except ConfigError as error:
            raise ConvertError(f"{file}: {error}") from error
        hub_configs.check_model(cfg)
        of_parts = {
            "llm": families.config_from_hf(sources["llm"].json("config.json")),
            "siglip": hub_configs.siglip_vision_config_from_hf(
                sources["siglip"].json("config.json")
            ),
            "vae": hub_configs.vae_config_from_hf(sources["vae"].json("config.json"), batch_norm),
        }
    pixels = {"pixel_mean": cfg.und.pixel_mean, "pixel_std": cfg.und.pixel_std}
    of_parts["siglip"] = dataclasses.replace(of_parts["siglip"], **pixels)  # no key says them
    for name, described in (("llm", cfg.llm), ("siglip", cfg.und), ("vae", cfg.vae)):
        if of_parts[name] != described:
            raise ConvertError(
                f"{main.folder / name / 'config.json'}: expected the {name} of {file}: "
                f"{described}; got {of_parts[name]}"
            )
    return cfg
