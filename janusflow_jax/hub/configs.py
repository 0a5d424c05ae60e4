"""The JSON files of published folders <-> ModelConfig.

What `model_config_to_hf` writes is what is implemented: reading compares a folder's values with it.
A missing key takes the default of the published module. Unknown keys are ignored; whatever they
change about the tensors shows when those are compared with the config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from janusflow_jax.config import (
    GenConfig,
    LlamaConfig,
    ModelConfig,
    RepaConfig,
    SiglipConfig,
    StudentConfig,
    VaeConfig,
    checks as config_checks,
)
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub import families
from janusflow_jax.hub.json_values import check_values, json_object, numbers, present
from janusflow_jax.hub.tensors import raise_problems

OURS = "janusflow_jax"
"""Key of config.json for what the published format cannot hold: the name, REPA's head, and what a
student learned."""

SIGLIP_ACTS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
"""`SiglipConfig.act` by the names of transformers and timm."""

_LARGE = {"width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4, "patch_size": 16}
_SO400M = {"width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362, "patch_size": 14}
SIGLIP_SIZES: dict[str, dict[str, Any]] = {
    "siglip_so400m_patch14_224": _SO400M,
    "siglip_so400m_patch14_384": _SO400M,
    "siglip_large_patch16_256": _LARGE,
    "siglip_large_patch16_384": _LARGE,
}
"""The towers that the published code builds by `model_name`."""

# Values that are the same in every model of ours. docs/model.md describes the image preparation.
_PREPROCESSOR = {
    "min_size": 14,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_normalize": True,
    "background_color": [127] * 3,
}
_RESCALE = 1 / 255
_CONVNEXT = {
    "dropout": 0.0,
    "elementwise_affine": True,
    "use_bias": True,
    "use_mid_block": True,
}
_KL, _FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
_VAE_CLASSES = {_KL: "of SDXL, SD 3 or FLUX.1", _FLUX2: "of FLUX.2"}
_BATCH_NORM_EPS = 1e-4


def check_model(cfg: ModelConfig) -> None:
    """Raises ConvertError if no model can have this config."""
    problems = config_checks.model_problems(cfg)
    raise_problems("the config files describe a model that cannot exist", problems)


def model_config_from_hf(
    main: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    vae: Mapping[str, Any],
    batch_norm: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The model that a published folder describes.

    REPA's head is no part of a published model: its config comes from our own key, else its layer
    is a quarter of the depth.

    Args: config.json, preprocessor_config.json ({} if there is none) and what
      `vae_config_from_hf` takes.
    Raises:
      ConvertError: not JanusFlow's, or values that are not implemented.
    """
    if "vision_gen_enc_config" not in main:
        kind = main.get("model_type")
        if "gen_vision_config" in main:
            kind = "Janus or Janus-Pro, which generate images from a codebook"
        raise ConvertError(f"config.json: expected JanusFlow (vision_gen_enc_config); got {kind}")
    language = json_object("config.json", main, "language_config")
    names = [f"vision_{name}_config" for name in ("und_enc", "gen_enc", "gen_dec")]
    und_params, enc_params, dec_params = (
        json_object(f"config.json: {name}", json_object("config.json", main, name), "params")
        for name in names
    )
    language = present(language)
    required = {"tie_word_embeddings": False, "model_type": "llama"}  # what it builds
    check_values("config.json: language_config", language, required)
    preprocessor = present(preprocessor)
    check_values("preprocessor_config.json", preprocessor, _PREPROCESSOR)
    llm, und, vae_cfg = (
        families.config_from_hf(language),
        _siglip_config_from_hf(und_params),
        vae_config_from_hf(vae, batch_norm),
    )
    defaults = {"rescale_factor": _RESCALE, "image_size": und.image_size}
    rescale, image_size = numbers("preprocessor_config.json", preprocessor, defaults).values()
    if not math.isclose(rescale, _RESCALE, rel_tol=1e-6):  # some files round it
        raise ConvertError(
            f"preprocessor_config.json: rescale_factor: expected 1/255; got {rescale}"
        )
    ours = json_object("config.json", main, OURS, {})
    repa = {"layer": max(1, llm.num_layers // 4), "width": llm.width}
    stored = json_object(f"config.json: {OURS}", ours, "repa", {})
    repa = numbers(f"config.json: {OURS}.repa", stored, repa)
    stored = json_object(f"config.json: {OURS}", ours, "student", {})
    needed = {"steps": 1, "guidance_scale": 2.0}
    student = numbers(f"config.json: {OURS}.student", stored, needed) if stored else {}
    cfg = ModelConfig(
        name=ours.get("name", "hub"),
        image_size=image_size,
        llm=llm,
        und=und,
        gen=_gen_config_from_hf(present(enc_params), present(dec_params), llm, vae_cfg),
        vae=vae_cfg,
        repa=RepaConfig(**repa),
        student=StudentConfig(**student),
    )
    check_model(cfg)
    return cfg


def _siglip_config_from_hf(values: Mapping[str, Any]) -> SiglipConfig:
    """`vision_und_enc_config.params`. Sizes beside the name, which only we write, override it."""
    values = present(values)
    name = values.get("model_name", "siglip_large_patch16_384")
    known = SIGLIP_SIZES.get(name, {}) if isinstance(name, str) else {}
    values = {"mlp_ratio": 4, **known, **values}
    where = "config.json: vision_und_enc_config.params"
    if missing := [k for k in ("width", "layers", "heads", "patch_size") if k not in values]:
        raise ConvertError(
            f"{where}.model_name: expected one of {', '.join(SIGLIP_SIZES)}, or {missing} beside "
            f"it; got {name!r}"
        )
    check_values(where, values, {"select_feature": "same"})
    sizes = numbers(where, values, {**_LARGE, "mlp_ratio": 4.0, "image_size": 336})
    layers, select = sizes["layers"], values.get("select_layer", -2)
    if not isinstance(select, int):
        raise ConvertError(f"{where}: select_layer: expected a whole number; got {select!r}")
    return SiglipConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        width=sizes["width"],
        num_layers=min(layers, layers + select + 1 if select <= 0 else select),
        num_heads=sizes["heads"],
        mlp_width=int(sizes["width"] * sizes["mlp_ratio"]),
        pixel_mean=tuple(values.get("pixel_mean", ())),
        pixel_std=tuple(values.get("pixel_std", ())),
    )


def siglip_act(where: str, values: Mapping[str, Any], key: str, default: str) -> str:
    """`SiglipConfig.act` by the name that transformers or timm gives it."""
    act = values.get(key, default)
    if act not in SIGLIP_ACTS:
        raise ConvertError(f"{where}: {key}: expected one of {', '.join(SIGLIP_ACTS)}; got {act!r}")
    return SIGLIP_ACTS[act]


def siglip_vision_config_from_hf(values: Mapping[str, Any]) -> SiglipConfig:
    """config.json of transformers: of a whole model, or of its tower.

    A SiglipVisionConfig, whose defaults these are, has an image size; a Siglip2VisionConfig
    (NaFlex) has a square table of positions.
    """
    where = "config.json of the tower"
    values = present(values)
    values = present(json_object(where, values, "vision_config", values))
    defaults: dict[str, Any] = {
        "patch_size": 16,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-6,
    }
    naflex = "num_patches" in values or values.get("model_type") == "siglip2_vision_model"
    defaults |= {"num_patches": 256} if naflex else {"image_size": 224}
    sizes = numbers(where, values, defaults)
    if naflex:
        sizes["image_size"] = math.isqrt(sizes["num_patches"]) * sizes["patch_size"]
    return SiglipConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        width=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_width=sizes["intermediate_size"],
        norm_eps=sizes["layer_norm_eps"],
        act=siglip_act(where, values, "hidden_act", "gelu_pytorch_tanh"),
    )


def siglip_vision_config_to_hf(und: SiglipConfig) -> dict[str, Any]:
    """config.json of transformers' SiglipVisionModel, without a pooling head.

    It has no key for `pixel_mean` and `pixel_std`.
    """
    return {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "image_size": und.image_size,
        "patch_size": und.patch_size,
        "hidden_size": und.width,
        "num_hidden_layers": und.num_layers,
        "num_attention_heads": und.num_heads,
        "intermediate_size": und.mlp_width,
        "layer_norm_eps": und.norm_eps,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[und.act],
        "vision_use_head": False,
    }


def _gen_config_from_hf(
    enc: dict[str, Any], dec: dict[str, Any], llm: LlamaConfig, vae: VaeConfig
) -> GenConfig:
    """The ConvNeXt encoder's and decoder's params, which must describe one pair."""
    defaults = {"block_out_channels": [768], "layers_in_middle": 2, "norm_eps": 1e-6}
    widths, num_blocks, eps = numbers(
        "config.json: vision_gen_enc_config.params", enc, defaults
    ).values()
    gen = GenConfig(width=widths[0], num_blocks=num_blocks, patch_size=2, norm_eps=eps)
    if enc.get("padding") == "valid":
        enc["padding"] = 0
    enc_required, dec_required = _convnext_to_hf(gen, llm, vae)
    enc_defaults = {"hidden_size": 2048, "input_channels": 3, "kernel_size": 7, "stride": 4}
    check_values("config.json: vision_gen_enc_config.params", enc, enc_required, enc_defaults)
    dec_defaults = {"hidden_size": 2048, "upsamples": 2}
    check_values("config.json: vision_gen_dec_config.params", dec, dec_required, dec_defaults)
    return gen


def _convnext_to_hf(
    gen: GenConfig, llm: LlamaConfig, vae: VaeConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The params of the ConvNeXt encoder and of the decoder."""
    both = {
        "block_out_channels": [gen.width],
        "layers_in_middle": gen.num_blocks,
        "hidden_size": llm.width,
        "norm_eps": gen.norm_eps,
        **_CONVNEXT,
    }
    encoder = {"input_channels": vae.latent_channels, "kernel_size": 2, "stride": 2, "padding": 0}
    decoder = {"in_channels": gen.width, "out_channels": vae.latent_channels, "upsamples": 1}
    return both | encoder, both | decoder


def vae_config_from_hf(
    values: Mapping[str, Any], batch_norm: Mapping[str, Any] | None = None
) -> VaeConfig:
    """config.json of diffusers' AutoencoderKL or AutoencoderKLFlux2, whose defaults these are.

    Args: batch_norm: FLUX.2's buffers 'running_mean' and 'running_var', of 2 x 2 latent pixels.
    """
    values = present(values)
    where = "config.json of the VAE"
    kind = values.get("_class_name", _KL)
    if kind not in _VAE_CLASSES:
        known = " or ".join(f"{name} ({models})" for name, models in _VAE_CLASSES.items())
        raise ConvertError(f"{where}: _class_name: expected {known}; got {kind!r}")
    sizes: dict[str, Any] = {
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    }
    if kind == _FLUX2:
        sizes = {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "latent_channels": 32,
            "batch_norm_eps": _BATCH_NORM_EPS,
        }
    sizes = numbers(where, values, sizes)
    channels = decoder_channels = tuple(sizes["block_out_channels"])
    if kind == _FLUX2:
        decoder = {"decoder_block_out_channels": channels}
        decoder_channels = tuple(numbers(where, values, decoder)["decoder_block_out_channels"])
        shift, std = _flux2_statistics(where, batch_norm or {}, sizes["batch_norm_eps"])
    else:
        shift, std = _latent_statistics(where, values, sizes["latent_channels"])
    cfg = VaeConfig(
        channels=channels,
        layers_per_block=sizes["layers_per_block"],
        norm_groups=sizes["norm_num_groups"],
        latent_channels=sizes["latent_channels"],
        scaling_factor=sizes.get("scaling_factor", 1.0),
        shift=shift,
        std=std,
        quant_convs=bool(values.get("use_quant_conv", True)),
        decoder_channels=decoder_channels if decoder_channels != channels else (),
    )
    required = {k: x for k, x in vae_config_to_hf(cfg).items() if k not in _STATISTICS}
    required["mid_block_add_attention"] = True
    check_values(where, values, required, {"_class_name": kind, "use_post_quant_conv": True})
    return cfg


_STATISTICS = {"shift_factor", "latents_mean", "latents_std", "scaling_factor", "batch_norm_eps"}


def _latent_statistics(
    where: str, values: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`VaeConfig.shift` and `std`. As in diffusers, the mean replaces the shift."""
    lists = {k: values[k] for k in ("latents_mean", "latents_std") if k in values}
    if len(lists) == 1:
        raise ConvertError(f"{where}: expected latents_mean and latents_std; got {[*lists]}")
    for key, items in lists.items():
        fits = isinstance(items, list) and len(items) == channels and all(map(_is_number, items))
        if not fits:
            raise ConvertError(f"{where}: {key}: expected {channels} numbers; got {items!r}")
    if lists:
        mean, std = lists.values()
        return tuple(map(float, mean)), tuple(map(float, std))
    shift = values.get("shift_factor", 0.0)
    if not _is_number(shift):
        raise ConvertError(f"{where}: shift_factor: expected a number; got {shift!r}")
    return (float(shift),) if shift else (), ()


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e37


def _flux2_statistics(
    where: str, batch_norm: Mapping[str, Any], eps: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`VaeConfig.shift` and `std` of FLUX.2's batch norm without a scale and a bias."""
    names = ("running_mean", "running_var")
    if missing := [f"bn.{n}" for n in names if n not in batch_norm]:
        raise ConvertError(f"{where}: {_FLUX2} needs the tensors {missing}; they are missing")
    mean, var = (np.asarray(batch_norm[n]).astype(np.float64) for n in names)
    return tuple(mean.tolist()), tuple(np.sqrt(var + eps).tolist())


def flux2_batch_norm(
    vae: VaeConfig, config: Mapping[str, Any]
) -> dict[str, Float[np.ndarray, " C4"]]:
    """The inverse of `_flux2_statistics`, exact in float32; {} for another VAE.

    Args: config: the config.json beside the tensors.
    """
    if config["_class_name"] != _FLUX2:
        return {}
    # In float64 the rounding of std**2 - eps is far below a bit of float32.
    var = np.asarray(vae.std) ** 2 - config.get("batch_norm_eps", _BATCH_NORM_EPS)
    return {
        "running_mean": np.asarray(vae.shift, np.float32),
        "running_var": var.astype(np.float32),
    }


def vae_config_to_hf(vae: VaeConfig) -> dict[str, Any]:
    """config.json of diffusers' class."""
    count = len(vae.channels)
    values = {
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(vae.channels),
        "layers_per_block": vae.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "latent_channels": vae.latent_channels,
        "norm_num_groups": vae.norm_groups,
        "use_quant_conv": vae.quant_convs,
        "use_post_quant_conv": vae.quant_convs,
    }
    if vae.decoder_channels:
        values["decoder_block_out_channels"] = list(vae.decoder_channels)
    if len(vae.std) == 4 * vae.latent_channels:
        flux2 = {"batch_norm_eps": _BATCH_NORM_EPS, "patch_size": [2, 2]}
        return {"_class_name": _FLUX2, **values, **flux2}
    values["scaling_factor"] = vae.scaling_factor
    if vae.std:
        values |= {"latents_mean": list(vae.shift), "latents_std": list(vae.std)}
    elif vae.shift:
        values["shift_factor"] = vae.shift[0]
    return {"_class_name": _KL, **values}


def _siglip_config_to_hf(und: SiglipConfig) -> dict[str, Any]:
    """`vision_und_enc_config.params`.

    The published code builds towers by name and knows SIGLIP_SIZES only. Others are called
    'siglip', with their sizes beside the name, and load only here.
    """
    ratio = und.mlp_width / und.width
    if int(und.width * ratio) != und.mlp_width:
        ratio = (und.mlp_width + 0.5) / und.width
    params = {
        "image_size": und.image_size,
        "model_name": _tower_name(und),
        "select_feature": "same",
        "select_layer": -1,
        "width": und.width,
        "layers": und.num_layers,
        "heads": und.num_heads,
        "mlp_ratio": ratio,
        "patch_size": und.patch_size,
    }
    if und.pixel_mean:
        params |= {"pixel_mean": list(und.pixel_mean), "pixel_std": list(und.pixel_std)}
    return params


def _tower_name(und: SiglipConfig) -> str:
    """The tower of SIGLIP_SIZES that this is, first those named after its image size."""
    plain = dataclasses.replace(und, pixel_mean=(), pixel_std=())
    fields = {"image_size": und.image_size, "select_layer": -1}
    same_size = lambda name: name.endswith(f"_{und.image_size}")  # noqa: E731
    for name in sorted(SIGLIP_SIZES, key=same_size, reverse=True):
        if _siglip_config_from_hf({"model_name": name, **fields}) == plain:
            return name
    return "siglip"


def check_exportable(cfg: ModelConfig) -> None:
    """Raises ConvertError that lists what no layout can hold of a model."""
    fixed = (
        ("und_encoder", cfg.und_encoder, "siglip"),
        ("repa_target", cfg.repa_target, "und_encoder"),
        ("und.final_norm", cfg.und.final_norm, True),
        ("vae.norm_eps", cfg.vae.norm_eps, 1e-6),
    )
    raise_problems(f"{cfg.name}: no published format can hold this model", _unlike(fixed))


def not_released(cfg: ModelConfig) -> list[str]:
    """What the released format cannot hold of a model: it is then exported in parts."""
    plain_llm = LlamaConfig()
    others = [f.name for f in dataclasses.fields(LlamaConfig) if f.name not in families.KEYS]
    llm = [(f"llm.{n}", getattr(cfg.llm, n), getattr(plain_llm, n)) for n in others]
    und, vae, plain = cfg.und, cfg.vae, VaeConfig()
    return _unlike(
        [
            *llm,
            ("gen.patch_size", cfg.gen.patch_size, 2),
            ("und.norm_eps", und.norm_eps, 1e-6),
            ("und.act", und.act, "gelu"),
            # The published sampler draws 4 channels and reads scaling_factor only.
            ("vae.latent_channels", vae.latent_channels, plain.latent_channels),
            ("vae.shift", vae.shift, plain.shift),
            ("vae.std", vae.std, plain.std),
            ("vae.quant_convs", vae.quant_convs, plain.quant_convs),
            ("vae.decoder_channels", vae.decoder_channels, plain.decoder_channels),
        ]
    )


def _unlike(fixed: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [
        f"model.{name}: expected {x!r}; got {value!r}" for name, value, x in fixed if value != x
    ]


def model_config_to_hf(cfg: ModelConfig, llm_extra: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `model_config_from_hf`, for a model with an empty `not_released`.

    Args: llm_extra: more keys for `language_config`, from the language model's own config.json.
    Returns: file name -> content: config.json, preprocessor_config.json, vae/config.json.
    """
    language = families.config_to_hf(cfg.llm, llm_extra)
    encoder, decoder = _convnext_to_hf(cfg.gen, cfg.llm, cfg.vae)
    parts = (
        ("vision_und_enc", "CLIPVisionTower", _siglip_config_to_hf(cfg.und)),
        ("vision_gen_enc", "ShallowUViTEncoder", encoder),
        ("vision_gen_dec", "ShallowUViTDecoder", decoder),
    )
    main = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": language,
        **{f"{n}_config": {"cls": c, "model_type": n, "params": p} for n, c, p in parts},
        OURS: {"name": cfg.name, "repa": dataclasses.asdict(cfg.repa)},
    }
    if cfg.student.steps:
        main[OURS]["student"] = dataclasses.asdict(cfg.student)
    preprocessor = {
        "processor_class": "VLChatProcessor",
        "image_processor_type": "VLMImageProcessor",
        "image_size": cfg.image_size,
        "rescale_factor": _RESCALE,
        **_PREPROCESSOR,
    }
    return {
        "config.json": main,
        "preprocessor_config.json": preprocessor,
        "vae/config.json": {**vae_config_to_hf(cfg.vae), "sample_size": cfg.image_size},
    }
