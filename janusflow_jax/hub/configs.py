"""The JSON files of published folders <-> ModelConfig.

A missing key takes the default of the published module; the tensors' shapes are compared later. An
unknown key is noted. A known key with a value that is not implemented here is a problem.
"""

from __future__ import annotations

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

SIGLIP_SIZES = {
    "siglip_so400m_patch14_224": (1152, 27, 16, 4304, 14),
    "siglip_so400m_patch14_384": (1152, 27, 16, 4304, 14),
    "siglip_large_patch16_256": (1024, 24, 16, 4096, 16),
    "siglip_large_patch16_384": (1024, 24, 16, 4096, 16),
}
"""model_name -> width, layers, heads, mlp width, patch size."""

OURS = "janusflow_jax"
"""Key of config.json for what the published format cannot hold: the name and REPA's head."""

_IGNORED = """
    _name_or_path architectures model_type cls torch_dtype dtype use_cache transformers_version
    bos_token_id eos_token_id pad_token_id max_position_embeddings initializer_range pretraining_tp
    _attn_implementation attn_implementation processor_class image_processor_type _class_name
    _diffusers_version _name sample_size force_upcast ckpt_path resample
""".split()
"""Keys that change nothing about what is computed here."""

# Keys with one implemented value, read and written: any other value is a problem.
_PREPROCESSOR = {
    "min_size": 14,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_normalize": True,
    "background_color": [127] * 3,
}
_CONVNEXT = {
    "dropout": 0.0,
    "elementwise_affine": True,
    "use_bias": True,
    "use_mid_block": True,
}
_AUTOENCODER = {"act_fn": "silu", "in_channels": 3, "out_channels": 3}

WRONG_TYPE = (TypeError, AttributeError, ValueError, ZeroDivisionError)
"""What reading a config raises if a value has the wrong type."""


class _Section:
    """One JSON object. Remembers problems, and which keys were read."""

    def __init__(self, values: Mapping[str, Any], where: str, problems: list[str]):
        self.values, self.where, self.problems = values, where, problems
        self.read: set[str] = set()

    def get(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def only(self, key: str, default: Any, *allowed: Any) -> None:
        """Adds a problem unless the value (or the default) is one of `allowed`."""
        value = self.get(key, default)
        if value not in allowed:
            origin = "" if key in self.values else " (the default of the missing key)"
            options = " or ".join(repr(a) for a in allowed)
            self.problems.append(f"{self.where}{key}: expected {options}; got {value!r}{origin}")

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Adds a problem for each key that differs; a missing key has the right default."""
        for key, value in values.items():
            self.only(key, value, value)

    def section(self, key: str) -> _Section:
        return _Section(self.get(key, {}), f"{self.where}{key}.", self.problems)

    def unknown(self) -> list[str]:
        return [self.where + k for k in self.values if k not in {*self.read, *_IGNORED}]


def model_config_from_hf(
    janusflow: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    vae: Mapping[str, Any],
    problems: list[str],
    notes: list[str],
) -> ModelConfig | None:
    """The model that a published folder describes; None if there are problems.

    REPA's head is no part of a published model: its config comes from our own key, else its layer
    is a quarter of the depth.

    Args:
      janusflow, preprocessor, vae: config.json, preprocessor_config.json ({} if there is none) and
        the AutoencoderKL's config.json.
      problems: gets every value that is not implemented; notes: gets the unknown keys.
    """
    known = len(problems)
    root = _Section(janusflow, "config.json: ", problems)
    processor = _Section(preprocessor, "preprocessor_config.json: ", problems)
    autoencoder = _Section(vae, "vae/config.json: ", problems)
    try:
        language = root.section("language_config")
        parts = {n: root.section(f"vision_{n}_config") for n in ("und_enc", "gen_enc", "gen_dec")}
        params = {n: s.section("params") for n, s in parts.items()}
        parts["und_enc"].only("cls", "CLIPVisionTower", "CLIPVisionTower")
        parts["gen_enc"].only("cls", "ShallowUViTEncoder", "ShallowUViTEncoder")
        parts["gen_dec"].only("cls", "ShallowUViTDecoder", "ShallowUViTDecoder")
        llm, und, vae_cfg = _llama(language), _siglip(params["und_enc"]), _vae(autoencoder)
        gen = _gen(params["gen_enc"], params["gen_dec"], llm, vae_cfg)
        _images(processor)
        ours = root.get(OURS, {})
        repa = RepaConfig(layer=max(1, llm.num_layers // 4), width=llm.width)
        cfg = ModelConfig(
            name=ours.get("name", "hub"),
            image_size=processor.get("image_size", und.image_size),
            llm=llm,
            und=und,
            gen=gen,
            vae=vae_cfg,
            repa=RepaConfig(**ours["repa"]) if "repa" in ours else repa,
        )
        if len(problems) == known:
            problems += config_checks.model_problems(cfg)
    except WRONG_TYPE as error:
        problems.append(f"config.json: a value has the wrong type: {error}")
        return None
    _note_unknown(
        [root, processor, autoencoder, language, *parts.values(), *params.values()], notes
    )
    return cfg if len(problems) == known else None


def _note_unknown(sections: list[_Section], notes: list[str]) -> None:
    unknown = [key for section in sections for key in section.unknown()]
    if unknown:
        notes.append(f"unknown keys, kept for export but not used: {', '.join(unknown)}")


def llama_config_from_hf(
    values: Mapping[str, Any], problems: list[str], notes: list[str]
) -> LlamaConfig:
    """config.json of a Llama's own folder. Its head may be tied."""
    section = _Section(values, "config.json: ", problems)
    cfg = _llama(section, tied=(False, True))
    _note_unknown([section], notes)
    return cfg


def vae_config_from_hf(
    values: Mapping[str, Any], problems: list[str], notes: list[str]
) -> VaeConfig:
    """config.json of an AutoencoderKL."""
    section = _Section(values, "vae/config.json: ", problems)
    cfg = _vae(section)
    _note_unknown([section], notes)
    return cfg


def _llama(s: _Section, tied: tuple[bool, ...] = (False,)) -> LlamaConfig:
    """`language_config`; defaults are transformers' LlamaConfig."""
    s.fixed({"model_type": "llama", "hidden_act": "silu", "attention_dropout": 0.0})
    s.fixed({"attention_bias": False, "mlp_bias": False})
    s.only("tie_word_embeddings", False, *tied)
    rope = s.get("rope_parameters", {})  # the form of transformers 5
    for scaling in (rope, s.get("rope_scaling", {})):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            s.problems.append(f"{s.where}rope_scaling: expected none; got {kind!r}")
    width, heads = s.get("hidden_size", 4096), s.get("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=s.get("vocab_size", 32000),
        width=width,
        mlp_width=s.get("intermediate_size", 11008),
        num_layers=s.get("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=s.get("num_key_value_heads", heads),
        head_dim=s.get("head_dim", width // heads),
        norm_eps=s.get("rms_norm_eps", 1e-6),
        rope_theta=float(s.get("rope_theta", rope.get("rope_theta", 10000.0))),
    )


def _siglip(s: _Section) -> SiglipConfig:
    """`vision_und_enc_config.params`; explicit sizes override the name."""
    name = s.get("model_name", "siglip_large_patch16_384")
    size = SIGLIP_SIZES.get(name)
    explicit = ("width", "layers", "heads", "patch_size")
    if size is None and not all(k in s.values for k in explicit):
        s.problems.append(
            f"{s.where}model_name: expected one of {', '.join(SIGLIP_SIZES)}, or all of "
            f"{', '.join(explicit)}; got {name!r}"
        )
    s.only("select_feature", "same", "same")
    width, layers, heads, mlp_width, patch = size or SIGLIP_SIZES["siglip_large_patch16_384"]
    width = s.get("width", width)
    layers = s.get("layers", layers)
    default_mlp = mlp_width if size and "width" not in s.values else 4 * width
    ratio = s.get("mlp_ratio", None)
    select = s.get("select_layer", -2)
    return SiglipConfig(
        image_size=s.get("image_size", 336),
        patch_size=s.get("patch_size", patch),
        width=width,
        num_layers=min(layers, layers + select + 1 if select <= 0 else select),
        num_heads=s.get("heads", heads),
        mlp_width=default_mlp if ratio is None else int(width * ratio),
        pixel_mean=tuple(s.get("pixel_mean", ())),
        pixel_std=tuple(s.get("pixel_std", ())),
    )


def _gen(enc: _Section, dec: _Section, llm: LlamaConfig, vae: VaeConfig) -> GenConfig:
    """The ConvNeXt encoder's and decoder's params, which must describe one pair."""
    widths = tuple(enc.get("block_out_channels", (768,)))
    width, blocks = widths[0], enc.get("layers_in_middle", 2)
    eps = enc.get("norm_eps", 1e-6)
    enc.only("block_out_channels", [width], [width], (width,))
    dec.only("block_out_channels", [width], [width], (width,))
    enc.only("input_channels", 3, vae.latent_channels)
    enc.only("kernel_size", 7, 2)
    enc.only("stride", 4, 2)
    enc.only("padding", 0, 0, "valid")
    dec.only("in_channels", width, width)
    dec.only("out_channels", vae.latent_channels, vae.latent_channels)
    dec.only("upsamples", 2, 1)
    dec.only("layers_in_middle", blocks, blocks)
    dec.only("norm_eps", eps, eps)
    for s in (enc, dec):
        s.only("hidden_size", 2048, llm.width)
        s.fixed(_CONVNEXT)
    return GenConfig(width=width, num_blocks=blocks, patch_size=2, norm_eps=eps)


def _images(s: _Section) -> None:
    """Image preparation is fixed (docs/model.md); other values are problems."""
    s.fixed(_PREPROCESSOR)
    if abs(s.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        s.problems.append(f"{s.where}rescale_factor: expected 1/255")


def _vae(s: _Section) -> VaeConfig:
    """diffusers' AutoencoderKL; defaults are its own."""
    channels = tuple(s.get("block_out_channels", (64,)))
    count = len(channels)
    down, up = ["DownEncoderBlock2D"] * count, ["UpDecoderBlock2D"] * count
    s.only("down_block_types", down[:1], down)
    s.only("up_block_types", up[:1], up)
    s.fixed(_AUTOENCODER)
    s.fixed(
        dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), True)
    )
    s.fixed(dict.fromkeys(("latents_mean", "latents_std", "shift_factor")))
    return VaeConfig(
        channels=channels,
        layers_per_block=s.get("layers_per_block", 1),
        norm_groups=s.get("norm_num_groups", 32),
        latent_channels=s.get("latent_channels", 4),
        scaling_factor=s.get("scaling_factor", 0.18215),
    )


def _siglip_name(und: SiglipConfig) -> str:
    """The published code builds towers by name and knows SIGLIP_SIZES only.

    Others are called 'siglip', with their sizes beside the name, and load only here.
    """
    size = (und.width, und.num_layers, und.num_heads, und.mlp_width, und.patch_size)
    names = [n for n, known in SIGLIP_SIZES.items() if known == size]
    same = [n for n in names if n.endswith(f"_{und.image_size}")]
    return [*same, *names, "siglip"][0]


def export_problems(cfg: ModelConfig) -> list[str]:
    """What the published format cannot hold of a model; empty if it can be exported."""
    fixed = (
        ("und_encoder", cfg.und_encoder, "siglip"),
        ("gen.patch_size", cfg.gen.patch_size, 2),
        ("und.norm_eps", cfg.und.norm_eps, 1e-6),
        ("und.final_norm", cfg.und.final_norm, True),
        ("vae.norm_eps", cfg.vae.norm_eps, 1e-6),
    )
    return [
        f"model.{name}: the published format allows only {only!r}; got {value!r}"
        for name, value, only in fixed
        if value != only
    ]


def model_config_to_hf(cfg: ModelConfig, llm_extra: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `model_config_from_hf`, for a model without `export_problems`.

    Args: llm_extra: more keys for `language_config`, from the language model's own config.json.
    Returns: file name -> content: config.json, preprocessor_config.json, vae/config.json.
    """
    llm, und, gen, vae = cfg.llm, cfg.und, cfg.gen, cfg.vae
    ratio = und.mlp_width / und.width
    if int(und.width * ratio) != und.mlp_width:
        ratio = (und.mlp_width + 0.5) / und.width
    convnext = {
        "block_out_channels": [gen.width],
        "layers_in_middle": gen.num_blocks,
        "hidden_size": llm.width,
        "norm_eps": gen.norm_eps,
        **_CONVNEXT,
    }
    tower = {
        "image_size": und.image_size,
        "model_name": _siglip_name(und),
        "select_feature": "same",
        "select_layer": -1,
        "width": und.width,
        "layers": und.num_layers,
        "heads": und.num_heads,
        "mlp_ratio": ratio,
        "patch_size": und.patch_size,
    }
    if und.pixel_mean:
        tower |= {"pixel_mean": list(und.pixel_mean), "pixel_std": list(und.pixel_std)}
    encoder = {
        "input_channels": vae.latent_channels,
        "kernel_size": 2,
        "stride": 2,
        "padding": 0,
    }
    decoder = {"in_channels": gen.width, "out_channels": vae.latent_channels, "upsamples": 1}
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
    parts = (
        ("vision_und_enc", "CLIPVisionTower", tower),
        ("vision_gen_enc", "ShallowUViTEncoder", convnext | encoder),
        ("vision_gen_dec", "ShallowUViTDecoder", convnext | decoder),
    )
    main = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": language,
        **{f"{n}_config": {"cls": c, "model_type": n, "params": p} for n, c, p in parts},
        OURS: {"name": cfg.name, "repa": {"layer": cfg.repa.layer, "width": cfg.repa.width}},
    }
    preprocessor = {
        "processor_class": "VLChatProcessor",
        "image_processor_type": "VLMImageProcessor",
        "image_size": cfg.image_size,
        "rescale_factor": 1 / 255,
        **_PREPROCESSOR,
    }
    count = len(vae.channels)
    autoencoder = {
        "_class_name": "AutoencoderKL",
        **_AUTOENCODER,
        "block_out_channels": list(vae.channels),
        "layers_per_block": vae.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "latent_channels": vae.latent_channels,
        "norm_num_groups": vae.norm_groups,
        "scaling_factor": vae.scaling_factor,
        "sample_size": cfg.image_size,
    }
    return {
        "config.json": main,
        "preprocessor_config.json": preprocessor,
        "vae/config.json": autoencoder,
    }
