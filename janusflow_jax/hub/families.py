"""Language models of transformers that are a Llama up to fields of `LlamaConfig`, or up to weights.

Some multiply or order numbers otherwise; conversion folds that into their weights, and what comes
out is a plain Llama. Source: the configuration and modeling files of transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from janusflow_jax.config import LlamaConfig, RopeConfig
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub.json_values import check_values, json_object, numbers, present
from janusflow_jax.hub.tensors import raise_problems

WHERE = "config.json of the language model"
KNOWN = "take for example Qwen3-1.7B-Base, Llama-3.2-1B or SmolLM2-1.7B"


class Family(NamedTuple):
    """How a `model_type` differs from Llama.

    attn_bias: biases that it has whatever its config says. defaults: of config.json, where they are
    not Llama's. required: the only value of a key that is implemented. architecture: transformers'
    class; '' where conversion makes a Llama.
    """

    architecture: str
    attn_bias: str = ""
    qk_norm: str = ""
    norms: str = "pre"
    defaults: Mapping[str, Any] = {}
    required: Mapping[str, Any] = {}


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),  # SmolLM 2, TinyLlama, DeepSeek (LLM, Coder) too
    "qwen2": Family("Qwen2ForCausalLM", attn_bias="qkv"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head", defaults={"head_dim": 128}),
    "olmo2": Family(
        "Olmo2ForCausalLM", qk_norm="all", norms="post", defaults={"rms_norm_eps": 1e-5}
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    ),
    "granite": Family(""),
    "granitemoehybrid": Family(
        "",
        defaults={"num_local_experts": 8, "position_embedding_type": "", "layer_types": ["mamba"]},
        required={"position_embedding_type": "rope"},
    ),
    "ernie4_5": Family(
        "",
        defaults={
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}
"""By transformers' `model_type`."""

OTHERS = {
    "qwen3_next": "layers with a recurrent state",
    "qwen3_5": "layers with a recurrent state",
    "gemma2": "caps on scores",
    "gemma3": "windows of fewer positions than an image has",
    "gemma3_text": "windows of fewer positions than an image has",
    "gpt_oss": "experts and attention sinks",
    "mixtral": "experts",
    "qwen2_moe": "experts",
    "qwen3_moe": "experts",
    "olmoe": "experts",
    "deepseek_v2": "latent attention and experts",
    "deepseek_v3": "latent attention and experts",
    "minicpm3": "latent attention",
    "mamba": "layers with a recurrent state",
    "falcon_h1": "layers with a recurrent state",
    "lfm2": "convolutions",
    "olmo3": "windows of positions",
    "phi3": "fused projections and partly rotated heads",
}
"""Known model types that are not implemented, and why."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((), "dequantize the weights first"),
    "use_sliding_window": ((False,), "windows of positions are not implemented"),
    "layer_types": ((), "only layers of full attention are implemented"),
    "num_experts": ((0,), "experts are not implemented"),
    "num_local_experts": ((0,), "experts are not implemented"),
    "n_routed_experts": ((0,), "experts are not implemented"),
    "kv_lora_rank": ((), "latent attention is not implemented"),
    "attn_logit_softcapping": ((), "caps on scores are not implemented"),
    "final_logit_softcapping": ((), "caps on logits are not implemented"),
    "attn_output_gate": ((False,), "gates of attention are not implemented"),
    "partial_rotary_factor": ((1, 1.0), "partly rotated heads are not implemented"),
}
"""Keys that change what a model computes -> the values that do not, and what to know."""

KEYS = {
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
"""Field of LlamaConfig -> key of config.json, of what the released format has."""

_FULL = {"full_attention", "attention"}
_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_positions"),
}
"""Kinds of rotary positions, and the fields of `RopeConfig` that each reads."""
_THEIRS = {"original_positions": "original_max_position_embeddings"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""Granite's, with transformers' defaults."""


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A language model's config.json with the defaults of its family.

    Raises:
      ConvertError: a family that is not implemented; says why, and what is.
    """
    values = present(values)
    kind = values.get("model_type", "llama")
    if kind not in FAMILIES:
        reason = f", which has {OTHERS[kind]}" if kind in OTHERS else ""
        raise ConvertError(
            f"{WHERE}: model_type: expected one of {', '.join(FAMILIES)}; got {kind!r}{reason}: "
            f"{KNOWN}"
        )
    return {**FAMILIES[kind].defaults, **values, "model_type": kind}


def config_from_hf(values: Mapping[str, Any]) -> LlamaConfig:
    """config.json of a language model; the defaults of missing keys are transformers'.

    Raises:
      ConvertError: a model that is not implemented, by its `model_type` or a key.
    """
    values = with_defaults(values)
    family = FAMILIES[values["model_type"]]
    theta, rope = _rope(values)
    _check_keys(values)
    neutral = {"hidden_act": "silu", "attention_dropout": 0.0}
    check_values(WHERE, values, {**neutral, **family.required})
    mlp = "shared_intermediate_size" if fused_mlp(values) else "intermediate_size"
    sizes = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        mlp: 11008,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-6,
    }
    sizes = numbers(WHERE, values, sizes)
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    derived = {"num_key_value_heads": heads, "head_dim": width // heads}
    sizes |= numbers(WHERE, values, derived)
    biased = values.get("attention_bias") or values.get("use_bias")
    return LlamaConfig(
        vocab_size=sizes["vocab_size"],
        width=width,
        mlp_width=sizes[mlp],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        norm_eps=sizes["rms_norm_eps"],
        rope_theta=theta,
        rope=rope,
        no_rope_layers=_no_rope_layers(values, sizes["num_hidden_layers"]),
        attn_bias=family.attn_bias or ("qkvo" if biased else ""),
        mlp_bias=bool(values.get("mlp_bias") or values.get("use_bias")),
        qk_norm=family.qk_norm,
        norms=family.norms,
        family=values["model_type"] if family.architecture else "llama",
    )


def config_to_hf(cfg: LlamaConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `config_from_hf`, for a model with a head of its own.

    Args: extra: more keys, from the config.json that the model came with.
    """
    if extra.get("model_type", "llama") != cfg.family:  # its weights were folded
        extra = {key: extra[key] for key in _TOKENS if key in extra}
    dropped = ("rope_parameters", "rope_scaling", "tie_word_embeddings", "torch_dtype", "dtype")
    out = {
        **{key: value for key, value in extra.items() if key not in dropped},
        "model_type": cfg.family,
        **{key: getattr(cfg, field) for field, key in KEYS.items()},
        "tie_word_embeddings": False,
    }
    if cfg.rope.type != "default":
        fields = {_THEIRS.get(name, name): getattr(cfg.rope, name) for name in _ROPE[cfg.rope.type]}
        out["rope_scaling"] = {"rope_type": cfg.rope.type, **fields}
    if cfg.family != "qwen2" and (cfg.attn_bias or "attention_bias" in extra):
        out["attention_bias"] = bool(cfg.attn_bias)
    if cfg.mlp_bias or "mlp_bias" in extra:
        out["mlp_bias"] = cfg.mlp_bias
    if cfg.family == "smollm3":
        out["no_rope_layers"] = [int(i not in cfg.no_rope_layers) for i in range(cfg.num_layers)]
    return out


def is_tied(values: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding table."""
    return bool(with_defaults(values).get("tie_word_embeddings", False))


def fused_mlp(values: Mapping[str, Any]) -> bool:
    """Whether gate and up are one tensor, and the MLP has Granite 4's names."""
    return values.get("model_type") == "granitemoehybrid"


def fold(llm: dict[str, Any], values: Mapping[str, Any], cfg: LlamaConfig) -> dict[str, Any]:
    """The parameters of a plain Llama that computes the same.

    A product with a factor that is no power of two is float32, because another rounding would
    change it.

    Args:
      llm: parameters in the layout of the files, layers stacked; without a head where it is tied.
      values: config.json.
    """
    values = with_defaults(values)
    if values["model_type"] == "ernie4_5":  # pairs are (2i, 2i + 1), ours (i, i + H/2)
        attn = llm["layers"]["block"]["attn"]
        for name in ("q", "k"):
            attn[name] = {n: _halves(x, cfg.head_dim) for n, x in attn[name].items()}
    if not FAMILIES[values["model_type"]].architecture and "granite" in values["model_type"]:
        given = numbers(WHERE, {**_MULTIPLIERS, **values}, _MULTIPLIERS)
        block = llm["layers"]["block"]
        attn, mlp, residual = block["attn"], block["mlp"], given["residual_multiplier"]
        score = given["attention_multiplier"] * math.sqrt(cfg.head_dim)
        head = llm.get("head") or {"kernel": llm["embedding"].T}
        attn["q"], attn["o"] = _times(attn["q"], score), _times(attn["o"], residual)
        mlp["down"] = _times(mlp["down"], residual)
        llm["head"] = _times(head, 1 / given["logits_scaling"])
        llm["embedding"] = _times(llm["embedding"], given["embedding_multiplier"])
    return llm


def _halves(x: np.ndarray, size: int) -> np.ndarray:
    """The last axis, heads of `size`, with even numbers of each head before odd ones."""
    pairs = x.reshape(*x.shape[:-1], -1, size // 2, 2)
    return np.ascontiguousarray(pairs.swapaxes(-1, -2)).reshape(x.shape)


def _times(x: Any, factor: float) -> Any:
    """A leaf or a linear's kernel and bias, times a factor."""
    if isinstance(x, dict):
        return {name: _times(leaf, factor) for name, leaf in x.items()}
    exact = math.frexp(factor)[0] == 0.5
    product = x.astype(np.float32) * np.float32(factor)
    return product.astype(x.dtype) if exact else product


def _check_keys(values: Mapping[str, Any]) -> None:
    """Raises ConvertError that names the keys of a model that is not implemented."""
    scaling = [x for key in ("rope_parameters", "rope_scaling") if (x := values.get(key))]
    problems = []
    for stored in [values, *scaling]:
        for key, (neutral, reason) in REFUSED.items():
            value = stored.get(key)
            if key == "layer_types" and isinstance(value, list):
                value = next((kind for kind in value if kind not in _FULL), None)
            if value is not None and value not in neutral:
                problems.append(f"{key}: got {value!r:.60}: {reason}")
    raise_problems(f"{WHERE}: another kind of model; {KNOWN}", problems)


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeConfig]:
    """Theta and the scaling, of `rope_scaling` or, since transformers 5, `rope_parameters`."""
    stored: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        stored |= present(json_object(WHERE, values, key, {}))
    kind = stored.get("rope_type", stored.get("type", "default"))
    if kind not in _ROPE or any(isinstance(x, dict) for x in stored.values()):
        raise ConvertError(
            f"{WHERE}: rope_type: expected one of {', '.join(_ROPE)}, for all layers; got "
            f"{kind if kind not in _ROPE else sorted(stored)!r}: {KNOWN}"
        )
    theta = numbers(WHERE, {**values, **stored}, {"rope_theta": 10000.0})
    theirs: dict[str, Any] = {
        _THEIRS.get(name, name): getattr(RopeConfig(), name) for name in _ROPE[kind]
    }
    given = numbers(f"{WHERE}: rope_scaling", stored, theirs)
    fields = dict(zip(_ROPE[kind], given.values(), strict=True))
    floats = {n: x if n == "original_positions" else float(x) for n, x in fields.items()}
    return float(theta["rope_theta"]), RopeConfig(type=kind, **floats)


def _no_rope_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """SmolLM 3's: its list has a 1 where positions *are* rotated."""
    if values["model_type"] != "smollm3":
        return ()
    every = numbers(WHERE, values, {"no_rope_layer_interval": 4})["no_rope_layer_interval"]
    rotated = values.get("no_rope_layers") or [(i + 1) % every for i in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) != num_layers:
        raise ConvertError(
            f"{WHERE}: no_rope_layers: expected {num_layers} numbers, 0 or 1; got {rotated!r:.60}"
        )
    return tuple(i for i, rotates in enumerate(rotated) if not rotates)
