"""What makes a config impossible: all problems at once, before anything is compiled.

What one field may be is beside the field (`fields.limited`). These checks involve several.
"""

from typing import Any

from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.fields import problems_of_fields, type_problems
from janusflow_jax.config.model import ModelConfig
from janusflow_jax.config.parts import MODEL_PARTS
from janusflow_jax.config.run import TrainConfig


class _Problems(list[str]):
    def require(self, holds: bool, field: str, expected: str, value: Any) -> None:
        if not holds:
            self.append(f"{field}: expected {expected}; got {value!r}")


def model_problems(cfg: ModelConfig) -> list[str]:
    """Every reason why a model of this config cannot be built."""
    if problems := type_problems(cfg, "model.") or problems_of_fields(cfg, "model."):
        return problems  # the checks below compute with these values
    problems = _Problems()
    require = problems.require
    llm, und, vae = cfg.llm, cfg.und, cfg.vae
    unit = vae.downscale * cfg.gen.patch_size
    require(cfg.image_size % unit == 0, "model.image_size", f"a multiple of {unit}", cfg.image_size)
    require(
        und.image_size == cfg.image_size,
        "model.und.image_size",
        f"model.image_size ({cfg.image_size})",
        und.image_size,
    )
    require(
        und.num_tokens == cfg.num_image_tokens,
        "model.und",
        f"{cfg.num_image_tokens} tokens an image, as generation has (a tower of patch {unit})",
        und.num_tokens,
    )
    require(
        cfg.und_encoder == "siglip" or cfg.repa_target == "siglip",
        "model.repa_target",
        f"'siglip' because model.und_encoder is {cfg.und_encoder!r}",
        cfg.repa_target,
    )
    heads = f"a multiple of num_kv_heads ({llm.num_kv_heads})"
    require(llm.num_heads % llm.num_kv_heads == 0, "model.llm.num_heads", heads, llm.num_heads)
    require(llm.head_dim % 2 == 0, "model.llm.head_dim", "an even number", llm.head_dim)
    layers = f"layers below {llm.num_layers}"
    inside = all(0 <= layer < llm.num_layers for layer in llm.no_rope_layers)
    require(inside, "model.llm.no_rope_layers", layers, llm.no_rope_layers)
    rope = llm.rope
    rising = rope.low_freq_factor < rope.high_freq_factor
    expected = f"above low_freq_factor ({rope.low_freq_factor})"
    require(rising, "model.llm.rope.high_freq_factor", expected, rope.high_freq_factor)
    heads = f"a multiple of num_heads ({und.num_heads})"
    require(und.width % und.num_heads == 0, "model.und.width", heads, und.width)
    for name, channels in (("channels", vae.channels), ("decoder_channels", vae.decoder_channels)):
        require(
            not any(width % vae.norm_groups for width in channels),
            f"model.vae.{name}",
            f"multiples of norm_groups ({vae.norm_groups})",
            channels,
        )
    require(
        len(vae.decoder_channels) in (0, len(vae.channels)),
        "model.vae.decoder_channels",
        f"0 or {len(vae.channels)} numbers, as channels",
        vae.decoder_channels,
    )
    counts = (0, 1, vae.latent_channels, 4 * vae.latent_channels)
    for name, values in (("shift", vae.shift), ("std", vae.std)):
        length = len(values)
        require(length in counts, f"model.vae.{name}", f"one of {counts} numbers", length)
        even = cfg.latent_size % 2 == 0 or length != counts[-1] or length == 1
        side = f"a latent of even size, because model.vae.{name} is of 2 x 2 latent pixels"
        require(even, "model.image_size", side, cfg.image_size)
    pixels = len(und.pixel_mean), len(und.pixel_std)
    require(pixels in ((0, 0), (3, 3)), "model.und.pixel_mean, pixel_std", "0 or 3 numbers", pixels)
    require(
        1 <= cfg.repa.layer <= llm.num_layers,
        "model.repa.layer",
        f"1 to {llm.num_layers} (llm.num_layers)",
        cfg.repa.layer,
    )
    return problems


def train_problems(cfg: TrainConfig) -> list[str]:
    """Every reason why a run of this config cannot start."""
    if wrong_types := type_problems(cfg):
        return wrong_types  # the checks below compute with these values
    problems = _Problems(problems_of_fields(cfg))
    require = problems.require
    data, optim = cfg.data, cfg.optim
    require(
        cfg.batch_rows % max(optim.accum_steps, 1) == 0,
        "optim.accum_steps",
        f"a divisor of batch_rows ({cfg.batch_rows})",
        optim.accum_steps,
    )
    left_out = data.row_at(cfg.num_steps * cfg.batch_rows) - cfg.num_steps * cfg.batch_rows
    most = (2**32 - left_out) // max(cfg.batch_rows, 1)
    require(
        cfg.num_steps <= most,
        "num_steps",
        f"at most 2^32 rows, with those of data.skip_rows: {most} steps of {cfg.batch_rows} rows",
        cfg.num_steps,
    )
    fits = cfg.attention not in ("splash", "flash") or data.row_len % 128 == 0
    require(fits, "data.row_len", f"a multiple of 128 for {cfg.attention} attention", data.row_len)
    rounds_fits = not cfg.matmul_precision or cfg.dtype == "float32"
    require(rounds_fits, "matmul_precision", "'' for dtype bfloat16", cfg.matmul_precision)
    require(
        # A slower average moves by less in a step than bfloat16 can represent.
        optim.moments_dtype == "float32" or (optim.name == "adamw" and optim.b2 <= 0.98),
        "optim.moments_dtype",
        "float32, or adamw with b2 of at most 0.98",
        (optim.moments_dtype, optim.name, optim.b2),
    )
    parts, named = (*cfg.model.parts, "vae"), [part for part, _ in cfg.init]
    fits = {*named} <= {*parts} and len({*named}) == len(named)
    require(fits, "init", f"names of {parts}, each once", named)
    reached = parts_lib.reached(cfg)
    tasks = ", ".join(dict.fromkeys(s.task for s in data.sources))
    usable = ", ".join(part for part in MODEL_PARTS if part in reached)
    require(
        cfg.lora.rank > 0 or any(parts_lib.top(path) in reached for path in cfg.train_parts),
        "train_parts",
        f"a part that the run's tasks ({tasks}) use: {usable}; or adapters (lora.rank above 0), "
        "because the run would train nothing",
        cfg.train_parts,
    )
    layers = [p for p in cfg.train_parts if p == "llm" or p.startswith("llm/layers")]
    require(
        not (cfg.lora.rank and layers),
        "train_parts",
        "no layers of the LLM beside adapters (lora.rank above 0)",
        layers,
    )
    if cfg.distills:
        why = "because the run trains a student (model.student.steps)"
        require(not cfg.loss.repa_weight, "loss.repa_weight", f"0 {why}", cfg.loss.repa_weight)
        held = [s.task for s in cfg.evaluate.sources]
        require("generate" not in held, "evaluate.sources", f"no task generate {why}", held)
    problems += _source_problems(cfg)
    if of_model := model_problems(cfg.model):
        return list(dict.fromkeys(problems + of_model))  # some are in both
    require(
        data.row_len > cfg.model.slot_len or all(s.task == "text" for s in data.sources),
        "data.row_len",
        f"more than the {cfg.model.slot_len} positions of an image of {cfg.model.image_size} px",
        data.row_len,
    )
    return problems


def _source_problems(cfg: TrainConfig) -> list[str]:
    problems = _Problems()
    require = problems.require
    data = cfg.data
    labels = [(s.label, s.task == "generate") for s in data.sources]
    require(len({*labels}) == len(labels), "data.sources", "different names", labels)
    names = [s.name or (s.split, s.task) for s in cfg.evaluate.sources]
    require(len({*names}) == len(names), "evaluate.sources", "different names", names)
    for i, source in enumerate(data.sources):
        later = source.weight_after if data.change_row > 0 else -1.0
        require(
            source.weight > 0 or (source.weight == 0 and later > 0),
            f"data.sources[{i}].weight",
            "> 0, or 0 with data.change_row and weight_after > 0",
            source.weight,
        )
    for task, field in (("generate", "gen_slots"), ("understand", "und_slots")):
        caches, slots = _caches(cfg, task), getattr(data, field)
        enough_slots = slots > 0 or not caches
        require(enough_slots, f"data.{field}", f"> 0 for sources of task {task}", slots)
        # The encoders run for a whole batch or not at all.
        require(
            all(caches.values()) or not any(caches.values()),
            "data.sources: cache",
            f"one for all sources of task {task}, or for none",
            caches,
        )
    caches = {name: cache for name, cache in _caches(cfg, "text").items() if cache}
    require(not caches, "data.sources: cache", "none for task text, which has no images", caches)
    # A cache for understanding holds features of a SigLIP that does not change.
    caches = {name: cache for name, cache in _caches(cfg, "understand").items() if cache}
    if cfg.model.und_encoder != "siglip":
        reason = f"model.und_encoder is {cfg.model.und_encoder!r}, not 'siglip'"
        expected = f"none for task understand, because {reason}"
        require(not caches, "data.sources: cache", expected, caches)
    elif any(parts_lib.top(path) == "und_encoder" for path in cfg.train_parts):
        reason = "SigLIP trains (und_encoder in train_parts)"
        expected = f"none for task understand, because {reason}"
        require(not caches, "data.sources: cache", expected, caches)
    return problems


def _caches(cfg: TrainConfig, task: str) -> dict[str, str]:
    """The caches of a task's sources, by name and split; '' for a source without one."""
    return {f"{s.name or s.path} {s.split}": s.cache for s in cfg.data.sources if s.task == task}
