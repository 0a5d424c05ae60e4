"""What makes a config impossible: all problems at once, before anything is compiled.

Limits of single fields stand beside the fields (`fields.limited`); here is what involves several.
"""

from __future__ import annotations

from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.fields import problems_of_fields
from janusflow_jax.config.model import ModelConfig
from janusflow_jax.config.parts import LORA_TARGETS, MODEL_PARTS
from janusflow_jax.config.run import SourceConfig, TrainConfig


def model_problems(cfg: ModelConfig) -> list[str]:
    """Every reason why a model of this config cannot be built."""
    bad = problems_of_fields(cfg, "model.")
    llm, und, vae = cfg.llm, cfg.und, cfg.vae
    unit = vae.downscale * cfg.gen.patch_size
    if cfg.image_size % unit:
        bad.append(f"model.image_size: expected a multiple of {unit}; got {cfg.image_size}")
    if und.image_size != cfg.image_size:
        bad.append(
            f"model.und.image_size: expected model.image_size ({cfg.image_size}); "
            f"got {und.image_size}"
        )
    if und.num_tokens != cfg.num_image_tokens:
        bad.append(
            f"model.und: expected (image_size/16)^2 = {cfg.num_image_tokens} tokens an image; "
            f"got {und.num_tokens} (image_size {und.image_size}, patch_size {und.patch_size})"
        )
    if cfg.und_encoder != "siglip" and cfg.repa_target == "und_encoder":
        bad.append(
            "model.repa_target: expected 'siglip' because model.und_encoder is "
            f"{cfg.und_encoder!r}; got 'und_encoder'"
        )
    if llm.num_heads % llm.num_kv_heads:
        bad.append(
            f"model.llm.num_heads: expected a multiple of num_kv_heads ({llm.num_kv_heads}); "
            f"got {llm.num_heads}"
        )
    if und.width % und.num_heads:
        bad.append(
            f"model.und.width: expected a multiple of num_heads ({und.num_heads}); got {und.width}"
        )
    if any(c % vae.norm_groups for c in vae.channels):
        bad.append(
            f"model.vae.channels: expected multiples of norm_groups ({vae.norm_groups}); "
            f"got {vae.channels}"
        )
    if len(und.pixel_mean) != len(und.pixel_std) or len(und.pixel_mean) not in (0, 3):
        bad.append("model.und.pixel_mean and pixel_std: expected both empty or 3 numbers each")
    if not 1 <= cfg.repa.layer <= llm.num_layers:
        bad.append(
            f"model.repa.layer: expected 1 to {llm.num_layers} (llm.num_layers); "
            f"got {cfg.repa.layer}"
        )
    return bad


def train_problems(cfg: TrainConfig) -> list[str]:
    """Every reason why a run of this config cannot start."""
    bad = [p for p in problems_of_fields(cfg) if not p.startswith("model.")]
    bad += model_problems(cfg.model)
    data, optim = cfg.data, cfg.optim
    if not data.sources:
        bad.append("data.sources: expected at least one source; got none")
    if optim.accum_steps < 1 or cfg.batch_rows % optim.accum_steps:
        bad.append(
            f"optim.accum_steps: expected a divisor of batch_rows ({cfg.batch_rows}); "
            f"got {optim.accum_steps}"
        )
    if cfg.attention == "splash" and data.row_len % 128:
        bad.append(
            f"data.row_len: expected a multiple of 128 for splash attention; got {data.row_len}"
        )
    if cfg.attention == "cudnn" and cfg.dtype != "bfloat16":
        bad.append(f"dtype: expected bfloat16 for cudnn attention; got {cfg.dtype!r}")
    if optim.moments_dtype == "bfloat16" and (optim.name != "adamw" or optim.b2 > 0.98):
        # A slower average moves by less in a step than bfloat16 can represent.
        bad.append(
            "optim.moments_dtype: bfloat16 needs adamw with b2 of at most 0.98; got "
            f"{optim.name} with {optim.b2}"
        )
    unknown = sorted(p for p in cfg.train_parts if parts_lib.top(p) not in MODEL_PARTS)
    if unknown:
        bad.append(f"train_parts: expected {MODEL_PARTS} or paths below them; got {unknown}")
    parts = (*cfg.model.parts, "vae")
    unknown = sorted({part for part, _ in cfg.init} - {*parts})
    if unknown:
        bad.append(f"init: expected names of {parts}; got {unknown}")
    names = [s.name or (s.split, s.task) for s in cfg.evaluate.sources]
    if len(names) != len(set(names)):
        bad.append(f"evaluate.sources: expected different names; got {names}")
    for i, source in enumerate(data.sources):
        bad += _source_problems(source, f"data.sources[{i}]", cfg)
    for i, source in enumerate(cfg.evaluate.sources):
        bad += _field_name_problems(source, f"evaluate.sources[{i}]")
    return bad + _lora_problems(cfg) + _trains_nothing(cfg) + _cache_problems(cfg)


def _source_problems(source: SourceConfig, where: str, cfg: TrainConfig) -> list[str]:
    bad = _field_name_problems(source, where)
    later = source.weight_after if cfg.data.change_row > 0 else -1.0
    if source.weight < 0 or (source.weight == 0 and later <= 0):
        bad.append(
            f"{where}.weight: expected > 0, or 0 with data.change_row and weight_after > 0; "
            f"got {source.weight}"
        )
    if source.task == "generate" and cfg.data.gen_slots < 1:
        bad.append(f"data.gen_slots: expected > 0 because {where} has task generate")
    if source.task == "understand" and cfg.data.und_slots < 1:
        bad.append(f"data.und_slots: expected > 0 because {where} has task understand")
    return bad


def _field_name_problems(source: SourceConfig, where: str) -> list[str]:
    ours = [pair[0] for pair in source.fields if len(pair) == 2]
    if len(ours) == len(source.fields) == len(set(ours)):
        return []
    return [
        f"{where}.fields: expected pairs (our name, the data set's name), each of ours once; "
        f"got {source.fields}"
    ]


def _trains_nothing(cfg: TrainConfig) -> list[str]:
    """Parts that the run does not reach may stand in `train_parts` beside others, not alone."""
    reached = parts_lib.reached(cfg)
    if cfg.lora.rank or any(parts_lib.top(p) in reached for p in cfg.train_parts):
        return []
    tasks = ", ".join(dict.fromkeys(s.task for s in cfg.data.sources)) or "none"
    usable = ", ".join(p for p in MODEL_PARTS if p in reached)
    return [
        f"train_parts: the run would train nothing: expected a part that its tasks ({tasks}) use: "
        f"{usable}; or adapters (lora.rank above 0); got {cfg.train_parts}"
    ]


def _lora_problems(cfg: TrainConfig) -> list[str]:
    targets, bad = cfg.lora.targets, []
    if not targets or len(set(targets)) < len(targets) or set(targets) - set(LORA_TARGETS):
        bad.append(f"lora.targets: expected some of {list(LORA_TARGETS)}; got {targets}")
    layers = [p for p in cfg.train_parts if p == "llm" or p.startswith("llm/layers")]
    if cfg.lora.rank and layers:
        bad.append(
            f"train_parts: expected no layers of the LLM beside adapters (lora.rank above 0); "
            f"got {layers}"
        )
    return bad


def _cache_problems(cfg: TrainConfig) -> list[str]:
    """Problems that show before the caches are open; `encode_cache.check` finds the rest."""
    bad = []
    for task in ("generate", "understand"):
        names = {bool(s.cache): s.name for s in cfg.data.sources if s.task == task}
        if len(names) > 1:
            # The encoders run for a whole batch or not at all.
            bad.append(
                f"cache: expected one for all sources of task {task}, or for none; "
                f"{names[True]!r} has one, {names[False]!r} does not"
            )
    bad += [
        f"source {s.name!r} cache: expected '' for a text source; got {s.cache!r}"
        for s in cfg.data.sources
        if s.task == "text" and s.cache
    ]
    cached = [s.name for s in cfg.data.sources if s.task == "understand" and s.cache]
    if cached and cfg.model.und_encoder != "siglip":
        bad.append(
            f"source {cached[0]!r} cache: expected '' because model.und_encoder is "
            f"{cfg.model.und_encoder!r}; a cache holds features of a frozen SigLIP"
        )
    elif cached and any(parts_lib.top(p) == "und_encoder" for p in cfg.train_parts):
        bad.append(
            f"source {cached[0]!r} cache: expected '' because SigLIP trains (und_encoder in "
            "train_parts): its features change with every step"
        )
    return bad
