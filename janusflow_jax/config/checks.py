"""What makes a config impossible: all problems at once, before anything is compiled.

What one field may be is beside the field (`fields.limited`). These checks involve several.
"""

from collections.abc import Iterable
from typing import Any

from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.fields import problems_of_fields
from janusflow_jax.config.model import ModelConfig
from janusflow_jax.config.parts import MODEL_PARTS
from janusflow_jax.config.run import TrainConfig

Check = tuple[str, bool, str, Any]
"""(name of a field, whether its value is possible, what is expected, value)."""


def _problems(checks: Iterable[Check]) -> list[str]:
    failed = (check for check in checks if not check[1])
    return [f"{name}: expected {expected}; got {value!r}" for name, _, expected, value in failed]


def model_problems(cfg: ModelConfig) -> list[str]:
    """Every reason why a model of this config cannot be built."""
    return problems_of_fields(cfg, "model.") + _problems(_model_checks(cfg))


def train_problems(cfg: TrainConfig) -> list[str]:
    """Every reason why a run of this config cannot start."""
    checks = [*_model_checks(cfg.model), *_run_checks(cfg), *_source_checks(cfg)]
    return problems_of_fields(cfg) + _problems(checks)


def _model_checks(cfg: ModelConfig) -> Iterable[Check]:
    llm, und, vae = cfg.llm, cfg.und, cfg.vae
    unit = vae.downscale * cfg.gen.patch_size
    yield "model.image_size", cfg.image_size % unit == 0, f"a multiple of {unit}", cfg.image_size
    same = f"model.image_size ({cfg.image_size})"
    yield "model.und.image_size", und.image_size == cfg.image_size, same, und.image_size
    tokens = f"(image_size/16)^2 = {cfg.num_image_tokens} tokens an image"
    yield "model.und", und.num_tokens == cfg.num_image_tokens, tokens, und.num_tokens
    has_target = cfg.und_encoder == "siglip" or cfg.repa_target == "siglip"
    needed = f"'siglip' because model.und_encoder is {cfg.und_encoder!r}"
    yield "model.repa_target", has_target, needed, cfg.repa_target
    divisor = f"a multiple of num_kv_heads ({llm.num_kv_heads})"
    yield "model.llm.num_heads", llm.num_heads % llm.num_kv_heads == 0, divisor, llm.num_heads
    divisor = f"a multiple of num_heads ({und.num_heads})"
    yield "model.und.width", und.width % und.num_heads == 0, divisor, und.width
    divisible = not any(channels % vae.norm_groups for channels in vae.channels)
    divisor = f"multiples of norm_groups ({vae.norm_groups})"
    yield "model.vae.channels", divisible, divisor, vae.channels
    pixels = (len(und.pixel_mean), len(und.pixel_std))
    yield "model.und.pixel_mean, pixel_std", pixels in ((0, 0), (3, 3)), "none or 3 numbers", pixels
    layers = f"1 to {llm.num_layers} (llm.num_layers)"
    yield "model.repa.layer", 1 <= cfg.repa.layer <= llm.num_layers, layers, cfg.repa.layer


def _run_checks(cfg: TrainConfig) -> Iterable[Check]:
    data, optim = cfg.data, cfg.optim
    divides = cfg.batch_rows % max(optim.accum_steps, 1) == 0
    divisor = f"a divisor of batch_rows ({cfg.batch_rows})"
    yield "optim.accum_steps", divides, divisor, optim.accum_steps
    in_blocks = cfg.attention != "splash" or data.row_len % 128 == 0
    yield "data.row_len", in_blocks, "a multiple of 128 for splash attention", data.row_len
    possible = cfg.attention != "cudnn" or cfg.dtype == "bfloat16"
    yield "dtype", possible, "bfloat16 for cudnn attention", cfg.dtype
    # A slower average moves by less in a step than bfloat16 can represent.
    precise = optim.moments_dtype == "float32" or (optim.name == "adamw" and optim.b2 <= 0.98)
    limit = "float32, or adamw with b2 of at most 0.98"
    yield "optim.moments_dtype", precise, limit, (optim.moments_dtype, optim.name, optim.b2)
    parts, init = (*cfg.model.parts, "vae"), [part for part, _ in cfg.init]
    yield "init", {*init} <= {*parts}, f"names of {parts}", init
    reached = parts_lib.reached(cfg)
    trains = cfg.lora.rank > 0 or any(parts_lib.top(path) in reached for path in cfg.train_parts)
    tasks = ", ".join(dict.fromkeys(s.task for s in data.sources))
    usable = ", ".join(part for part in MODEL_PARTS if part in reached)
    something = (
        f"a part that the run's tasks ({tasks}) use: {usable}; or adapters (lora.rank above 0), "
        "because the run would train nothing"
    )
    yield "train_parts", trains, something, cfg.train_parts
    layers = [p for p in cfg.train_parts if p == "llm" or p.startswith("llm/layers")]
    alone = "no layers of the LLM beside adapters (lora.rank above 0)"
    yield "train_parts", not (cfg.lora.rank and layers), alone, layers


def _source_checks(cfg: TrainConfig) -> Iterable[Check]:
    data = cfg.data
    names: list[Any] = [(s.name or s.path, s.split, s.task) for s in data.sources]
    yield "data.sources", len({*names}) == len(names), "different names", names
    names = [s.name or (s.split, s.task) for s in cfg.evaluate.sources]
    yield "evaluate.sources", len({*names}) == len(names), "different names", names
    for i, source in enumerate(data.sources):
        later = source.weight_after if data.change_row > 0 else -1.0
        used = source.weight > 0 or (source.weight == 0 and later > 0)
        more = "> 0, or 0 with data.change_row and weight_after > 0"
        yield f"data.sources[{i}].weight", used, more, source.weight
    for task, name in (("generate", "gen_slots"), ("understand", "und_slots")):
        caches = [s.cache for s in data.sources if s.task == task]
        slots, more = getattr(data, name), f"> 0 for sources of task {task}"
        yield f"data.{name}", slots > 0 or not caches, more, slots
        # The encoders run for a whole batch or not at all.
        alike = all(caches) or not any(caches)
        yield "cache", alike, f"one for all sources of task {task}, or for none", caches
    # A cache for understanding holds features of a SigLIP that does not change.
    caches = [s.cache for s in data.sources if s.task == "understand" and s.cache]
    encoder, trained = cfg.model.und_encoder, map(parts_lib.top, cfg.train_parts)
    frozen = f"none for task understand, because model.und_encoder is {encoder!r}, not 'siglip'"
    yield "cache", not caches or encoder == "siglip", frozen, caches
    frozen = "none for task understand, because SigLIP trains (und_encoder in train_parts)"
    yield "cache", not caches or "und_encoder" not in trained, frozen, caches
