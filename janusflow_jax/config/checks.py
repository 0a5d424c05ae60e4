"""What makes a config impossible: every reason at once, before anything is compiled."""

from __future__ import annotations

from janusflow_jax.config import (
    ATTENTION,
    LORA_TARGETS,
    MODEL_PARTS,
    OPTIMIZERS,
    REPA_TARGETS,
    UND_ENCODERS,
    ModelConfig,
    TrainConfig,
    parts as parts_lib,
)


def model_problems(cfg: ModelConfig) -> list[str]:
    """Every reason why a model of this config cannot be built; empty when it can."""
    bad = []
    llm, und, vae, gen = cfg.llm, cfg.und, cfg.vae, cfg.gen
    if cfg.image_size % (vae.downscale * gen.patch_size):
        unit = vae.downscale * gen.patch_size
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
    for name, value, known in (
        ("und_encoder", cfg.und_encoder, UND_ENCODERS),
        ("repa_target", cfg.repa_target, REPA_TARGETS),
    ):
        if value not in known:
            bad.append(f"model.{name}: expected one of {', '.join(known)}; got {value!r}")
    if cfg.und_encoder != "siglip" and cfg.repa_target == "und_encoder":
        bad.append(
            "model.repa_target: expected 'siglip' (a SigLIP of its own) where model.und_encoder "
            f"is {cfg.und_encoder!r}; got 'und_encoder'"
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
    """Every reason why a run of this config cannot start; empty when it can."""
    bad = model_problems(cfg.model)

    def check(ok: bool, message: str) -> None:
        if not ok:
            bad.append(message)

    data, optim, loss = cfg.data, cfg.optim, cfg.loss
    check(bool(data.sources), "data.sources: expected at least one source; got none")
    check(bool(cfg.name), "name: expected a name for the run; got ''")
    check(cfg.num_steps > 0, f"num_steps: expected > 0; got {cfg.num_steps}")
    check(cfg.batch_rows > 0, f"batch_rows: expected > 0; got {cfg.batch_rows}")
    for name in ("save_every_steps", "keep_every_steps", "watchdog_s"):
        value = getattr(cfg, name)
        check(value >= 0, f"{name}: expected 0 (off) or more; got {value}")
    check(
        optim.accum_steps > 0 and cfg.batch_rows % optim.accum_steps == 0,
        f"optim.accum_steps: expected a divisor of batch_rows ({cfg.batch_rows}); "
        f"got {optim.accum_steps}",
    )
    check(
        optim.name in OPTIMIZERS,
        f"optim.name: expected one of {', '.join(OPTIMIZERS)}; got {optim.name!r}",
    )
    check(optim.lr > 0, f"optim.lr: expected > 0; got {optim.lr}")
    check(0 <= optim.ema < 1, f"optim.ema: expected 0 (off) or in (0, 1); got {optim.ema}")
    check(
        loss.norm in ("per_task", "per_sample"),
        f"loss.norm: expected per_task or per_sample; got {loss.norm!r}",
    )
    check(
        loss.time in ("logit_normal", "uniform"),
        f"loss.time: expected logit_normal or uniform; got {loss.time!r}",
    )
    check(
        cfg.dtype in ("float32", "bfloat16"),
        f"dtype: expected float32 or bfloat16; got {cfg.dtype!r}",
    )
    check(
        cfg.attention in ("auto", *ATTENTION),
        f"attention: expected auto or one of {', '.join(ATTENTION)}; got {cfg.attention!r}",
    )
    check(
        cfg.attention != "splash" or data.row_len % 128 == 0,
        f"data.row_len: expected a multiple of 128 for splash attention; got {data.row_len}",
    )
    check(
        cfg.attention != "cudnn" or cfg.dtype == "bfloat16",
        f"dtype: expected bfloat16 for cudnn attention; got {cfg.dtype!r}",
    )
    check(
        0 <= data.drop_prompt < 1,
        f"data.drop_prompt: expected in [0, 1); got {data.drop_prompt}",
    )
    check(
        optim.moments_dtype in ("float32", "bfloat16"),
        f"optim.moments_dtype: expected float32 or bfloat16; got {optim.moments_dtype!r}",
    )
    check(
        optim.moments_dtype == "float32" or (optim.name == "adamw" and optim.b2 <= 0.98),
        "optim.moments_dtype: bfloat16 expects adamw with b2 of 0.98 or less (a slower average "
        f"moves by less than bfloat16 can hold); got {optim.name} with {optim.b2}",
    )
    check(
        cfg.frozen_dtype in ("float32", "bfloat16"),
        f"frozen_dtype: expected float32 or bfloat16; got {cfg.frozen_dtype!r}",
    )
    bad += lora_problems(cfg)
    bad += nothing_trained(cfg)
    unknown = sorted(p for p in cfg.train_parts if p.split("/")[0] not in MODEL_PARTS)
    check(not unknown, f"train_parts: expected {MODEL_PARTS} or paths below; got {unknown}")
    parts = (*cfg.model.parts, "vae")
    unknown = sorted({p for p, _ in cfg.init} - {*parts})
    check(not unknown, f"init: expected names of {parts}; got {unknown}")
    check(cfg.evaluate.rows > 0, f"evaluate.rows: expected > 0; got {cfg.evaluate.rows}")
    for name in ("every_steps", "max_rise"):
        value = getattr(cfg.evaluate, name)
        check(value >= 0, f"evaluate.{name}: expected 0 (off) or more; got {value}")
    named = [s.name or (s.split, s.task) for s in cfg.evaluate.sources]
    check(len(named) == len(set(named)), f"evaluate.sources: expected different names; got {named}")
    for s in (*data.sources, *cfg.evaluate.sources):
        check(
            s.task in ("generate", "understand", "text"),
            f"source {s.name!r} task: expected generate, understand or text; got {s.task!r}",
        )
        check(
            s.format in ("chat", "plain"),
            f"source {s.name!r} format: expected chat or plain; got {s.format!r}",
        )
        ours = [pair[0] for pair in s.fields if len(pair) == 2]
        check(
            len(ours) == len(s.fields) == len(set(ours)),
            f"source {s.name!r} fields: expected pairs (our name, the data set's), each of ours "
            f"once; got {s.fields}",
        )
        later = s.weight_after if data.change_row > 0 else -1.0
        check(
            s.weight > 0 or (s.weight == 0 and later > 0),
            f"source {s.name!r} weight: expected > 0, or 0 with data.change_row and weight_after "
            f"> 0; got {s.weight}",
        )
        check(
            s.task != "generate" or data.gen_slots > 0 or s in cfg.evaluate.sources,
            f"source {s.name!r} generates: expected data.gen_slots > 0; got 0",
        )
        check(
            s.task != "understand" or data.und_slots > 0 or s in cfg.evaluate.sources,
            f"source {s.name!r} understands: expected data.und_slots > 0; got 0",
        )
    return bad + cache_problems(cfg)


def nothing_trained(cfg: TrainConfig) -> list[str]:
    """Why the run would train nothing; a part that is not reached may stand beside others."""
    reached = parts_lib.reached_parts(cfg)
    if cfg.lora.rank or any(p.split("/")[0] in reached for p in cfg.train_parts):
        return []
    tasks = ", ".join(dict.fromkeys(s.task for s in cfg.data.sources)) or "none"
    known = ", ".join(p for p in MODEL_PARTS if p in reached)
    return [
        f"train_parts: the run would train nothing: expected at least one part that its tasks "
        f"({tasks}) reach: {known}; or adapters (lora.rank above 0); got {cfg.train_parts}"
    ]


def lora_problems(cfg: TrainConfig) -> list[str]:
    """Every reason why the adapters cannot be trained."""
    lora, bad = cfg.lora, []
    if lora.rank < 0 or lora.alpha <= 0:
        bad.append(
            f"lora: expected rank of 0 (off) or more and alpha > 0; got {lora.rank}, {lora.alpha}"
        )
    unknown = sorted(set(lora.targets) - set(LORA_TARGETS))
    if unknown or not lora.targets or len(set(lora.targets)) < len(lora.targets):
        bad.append(f"lora.targets: expected some of {list(LORA_TARGETS)}; got {lora.targets}")
    whole = [p for p in cfg.train_parts if p == "llm" or p.startswith("llm/layers")]
    if lora.rank and whole:
        bad.append(
            f"train_parts: {whole} train the LLM's layers themselves; expected none of them where "
            "lora.rank is above 0 (adapters stand for them)"
        )
    return bad


def cache_problems(cfg: TrainConfig) -> list[str]:
    """Every reason why the caches that sources name cannot be used; `latents.check` has the rest,
    once the caches are open."""
    bad = []
    for task in ("generate", "understand"):
        names = {bool(s.cache): s.name for s in cfg.data.sources if s.task == task}
        if len(names) > 1:
            bad.append(
                f"cache: expected all sources that {task} to have one, or none (the encoders run "
                f"for a whole batch, or not at all); {names[True]!r} has one, {names[False]!r} not"
            )
    bad += [
        f"source {s.name!r} cache: expected '' for a text source; got {s.cache!r}"
        for s in cfg.data.sources
        if s.task == "text" and s.cache
    ]
    reads = [s.name for s in cfg.data.sources if s.task == "understand" and s.cache]
    if reads and cfg.model.und_encoder != "siglip":
        bad.append(
            f"source {reads[0]!r} cache: expected '' where model.und_encoder is "
            f"{cfg.model.und_encoder!r}: a cache holds features of a frozen SigLIP"
        )
    elif reads and any(p.split("/")[0] == "und_encoder" for p in cfg.train_parts):
        bad.append(
            f"source {reads[0]!r} cache: expected '' where SigLIP trains (und_encoder in "
            "train_parts): its features change with every step"
        )
    return bad
