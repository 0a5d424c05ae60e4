"""The JSON files of published folders <-> ModelConfig.

What `model_config_to_hf` writes is what is implemented: reading compares a folder's values with it.
A missing key takes the default of the published module. Unknown keys are ignored; whatever they
change about the tensors shows when those are compared with the config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from janusflow_jax.config import (
    GenConfig,
    LlamaConfig,
    ModelConfig,
    RepaConfig,
    SiglipConfig,
    VaeConfig,
    checks as config_checks,
)
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub.tensors import raise_problems

OURS = "janusflow_jax"
"""Key of config.json for what the published format cannot hold: the name and REPA's head."""

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
_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
}
_AUTOENCODER = {
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
}


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object; a null counts as missing."""
    return {key: value for key, value in values.items() if value is not None}


def _check(
    where: str,
    values: Mapping[str, Any],
    required: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raises ConvertError for every value that is not implemented.

    Args:
      required: key -> the only value that is implemented.
      defaults: the published module's for missing keys, where it is not the required value.
    """
    actual = {**required, **(defaults or {}), **values}
    raise_problems(
        f"{where}: unsupported values",
        [f"{k}: expected {x!r}; got {actual[k]!r}" for k, x in required.items() if actual[k] != x],
    )


def check_model(cfg: ModelConfig) -> None:
    """Raises ConvertError if no model can have this config."""
    problems = config_checks.model_problems(cfg)
    raise_problems("the config files describe a model that cannot exist", problems)


def model_config_from_hf(
    main: Mapping[str, Any], preprocessor: Mapping[str, Any], vae: Mapping[str, Any]
) -> ModelConfig:
    """The model that a published folder describes.

    REPA's head is no part of a published model: its config comes from our own key, else its layer
    is a quarter of the depth.

    Args: config.json, preprocessor_config.json ({} if there is none) and the AutoencoderKL's
      config.json.
    Raises:
      ConvertError: not JanusFlow's, or values that are not implemented.
    """
    if "vision_gen_enc_config" not in main:
        kind = main.get("model_type")
        if "gen_vision_config" in main:
            kind = "Janus or Janus-Pro, which generate images from a codebook"
        raise ConvertError(f"config.json: expected JanusFlow (vision_gen_enc_config); got {kind}")
    language = main["language_config"]
    und_params, enc_params, dec_params = (
        main[f"vision_{name}_config"]["params"] for name in ("und_enc", "gen_enc", "gen_dec")
    )
    _check("config.json: language_config", _present(language), {"tie_word_embeddings": False})
    preprocessor = _present(preprocessor)
    _check("preprocessor_config.json", preprocessor, _PREPROCESSOR)
    rescale = preprocessor.get("rescale_factor", _RESCALE)
    if not math.isclose(rescale, _RESCALE, rel_tol=1e-6):  # some files round it
        raise ConvertError(
            f"preprocessor_config.json: rescale_factor: expected 1/255; got {rescale}"
        )
    llm, und, vae_cfg = (
        llama_config_from_hf(language),
        _siglip_config_from_hf(und_params),
        vae_config_from_hf(vae),
    )
    ours = main.get(OURS, {})
    repa = ours.get("repa", {"layer": max(1, llm.num_layers // 4), "width": llm.width})
    cfg = ModelConfig(
        name=ours.get("name", "hub"),
        image_size=preprocessor.get("image_size", und.image_size),
        llm=llm,
        und=und,
        gen=_gen_config_from_hf(_present(enc_params), _present(dec_params), llm, vae_cfg),
        vae=vae_cfg,
        repa=RepaConfig(**repa),
    )
    check_model(cfg)
    return cfg


def llama_config_from_hf(values: Mapping[str, Any]) -> LlamaConfig:
    """config.json of a Llama, or `language_config`; the defaults are transformers'."""
    values = _present(values)
    _check("config.json of the language model", values, _LLAMA)
    for key in ("rope_scaling", "rope_parameters"):  # the latter since transformers 5.0
        rope = values.get(key, {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConvertError(f"config.json: {key}: expected none; got {kind!r}")
    width, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=values.get("vocab_size", 32000),
        width=width,
        mlp_width=values.get("intermediate_size", 11008),
        num_layers=values.get("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim", width // heads),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(values.get("rope_theta", rope.get("rope_theta", 10000.0))),  # 5.0's key
    )


def _siglip_config_from_hf(values: Mapping[str, Any]) -> SiglipConfig:
    """`vision_und_enc_config.params`. Sizes beside the name, which only we write, override it."""
    values = _present(values)
    name = values.get("model_name", "siglip_large_patch16_384")
    values = {"mlp_ratio": 4, **SIGLIP_SIZES.get(name, {}), **values}
    where = "config.json: vision_und_enc_config.params"
    if missing := [k for k in ("width", "layers", "heads", "patch_size") if k not in values]:
        raise ConvertError(
            f"{where}.model_name: expected one of {', '.join(SIGLIP_SIZES)}, or {missing} beside "
            f"it; got {name!r}"
        )
    _check(where, values, {"select_feature": "same"})
    layers, select = values["layers"], values.get("select_layer", -2)
    return SiglipConfig(
        image_size=values.get("image_size", 336),
        patch_size=values["patch_size"],
        width=values["width"],
        num_layers=min(layers, layers + select + 1 if select <= 0 else select),
        num_heads=values["heads"],
        mlp_width=int(values["width"] * values["mlp_ratio"]),
        pixel_mean=tuple(values.get("pixel_mean", ())),
        pixel_std=tuple(values.get("pixel_std", ())),
    )


def _gen_config_from_hf(
    enc: dict[str, Any], dec: dict[str, Any], llm: LlamaConfig, vae: VaeConfig
) -> GenConfig:
    """The ConvNeXt encoder's and decoder's params, which must describe one pair."""
    gen = GenConfig(
        width=enc.get("block_out_channels", [768])[0],
        num_blocks=enc.get("layers_in_middle", 2),
        patch_size=2,
        norm_eps=enc.get("norm_eps", 1e-6),
    )
    if enc.get("padding") == "valid":
        enc["padding"] = 0
    enc_required, dec_required = _convnext_to_hf(gen, llm, vae)
    enc_defaults = {"hidden_size": 2048, "input_channels": 3, "kernel_size": 7, "stride": 4}
    _check("config.json: vision_gen_enc_config.params", enc, enc_required, enc_defaults)
    dec_defaults = {"hidden_size": 2048, "upsamples": 2}
    _check("config.json: vision_gen_dec_config.params", dec, dec_required, dec_defaults)
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


def vae_config_from_hf(values: Mapping[str, Any]) -> VaeConfig:
    """config.json of diffusers' AutoencoderKL, whose defaults these are."""
    values = _present(values)
    cfg = VaeConfig(
        channels=tuple(values.get("block_out_channels", (64,))),
        layers_per_block=values.get("layers_per_block", 1),
        norm_groups=values.get("norm_num_groups", 32),
        latent_channels=values.get("latent_channels", 4),
        scaling_factor=values.get("scaling_factor", 0.18215),
    )
    _check("config.json of the VAE", values, {**_AUTOENCODER, **_vae_config_to_hf(cfg)})
    return cfg


def _vae_config_to_hf(vae: VaeConfig) -> dict[str, Any]:
    count = len(vae.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(vae.channels),
        "layers_per_block": vae.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "latent_channels": vae.latent_channels,
        "norm_num_groups": vae.norm_groups,
        "scaling_factor": vae.scaling_factor,
    }


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
    """Raises ConvertError that lists what the published format cannot hold of a model."""
    fixed = (
        ("und_encoder", cfg.und_encoder, "siglip"),
        ("repa_target", cfg.repa_target, "und_encoder"),
        ("gen.patch_size", cfg.gen.patch_size, 2),
        ("und.norm_eps", cfg.und.norm_eps, 1e-6),
        ("und.final_norm", cfg.und.final_norm, True),
        ("vae.norm_eps", cfg.vae.norm_eps, 1e-6),
    )
    raise_problems(
        f"{cfg.name}: the published format cannot hold this model",
        [f"model.{name}: expected {x!r}; got {value!r}" for name, value, x in fixed if value != x],
    )


def model_config_to_hf(cfg: ModelConfig, llm_extra: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `model_config_from_hf`, for a model that passes `check_exportable`.

    Args: llm_extra: more keys for `language_config`, from the language model's own config.json.
    Returns: file name -> content: config.json, preprocessor_config.json, vae/config.json.
    """
    llm = cfg.llm
    dropped = ("rope_parameters", "rope_scaling", "tie_word_embeddings", "torch_dtype", "dtype")
    language = {k: v for k, v in llm_extra.items() if k not in dropped} | {
        "model_type": "llama",
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_width,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "num_hidden_layers": llm.num_layers,
        "head_dim": llm.head_dim,
        "vocab_size": llm.vocab_size,
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": False,
    }
    encoder, decoder = _convnext_to_hf(cfg.gen, llm, cfg.vae)
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
        "vae/config.json": {**_vae_config_to_hf(cfg.vae), "sample_size": cfg.image_size},
    }
