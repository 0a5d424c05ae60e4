"""Published folders of a Llama, a SigLIP and a VAE -> a model folder, the start of stage 1.

The other parts are initialized. The language model may have grouped heads, a tied head, and a
table without rows for the image tags. SigLIP's names may be those of transformers, timm or
open_clip.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save as safetensors_bytes

from janusflow_jax.config import (
    GenConfig,
    ModelConfig,
    RepaConfig,
    SiglipConfig,
    checks as config_checks,
)
from janusflow_jax.data import chat_format
from janusflow_jax.hub import configs as hub_configs, names, tensors
from janusflow_jax.hub.source import (
    LLM_CONFIG_FILE,
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    license_files,
    load_chat_format,
    open_vae,
    save_converted,
)
from janusflow_jax.models import janusflow

VOCAB_UNIT = 128
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""SigLIP's heads by width, for timm folders that do not name them."""


class Sources(NamedTuple):
    llm: Source
    siglip: Source
    vae: Source


def assemble(
    llm: Any,
    siglip: Any,
    vae: Any,
    out: Any,
    *,
    dtype: str = "",
    gen_width: int = 768,
    seed: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> ModelConfig:
    """Assembles the start of stage 1 into the model folder `out`.

    Args:
      llm, siglip, vae: published folders.
      dtype: 'bfloat16' or 'float32'; '' keeps each tensor's own, and new parts are float32.
      gen_width: width of the new ConvNeXt parts; seed: of their initialization.
      log: receives progress and notes, a line each.
    Raises:
      ConvertError: everything that is wrong with the folders; nothing was written.
      CheckpointError: `out` exists and `overwrite` is not set.
    """
    sources = Sources(Source(llm, "llm"), Source(siglip, "siglip"), open_vae(vae))
    tied = bool(sources.llm.config.get("tie_word_embeddings", False))
    sources.llm.drop(names.HF_BUFFERS, "computed from the config")
    if tied:
        sources.llm.drop(r"lm_head\.weight$", "the head is tied to the embedding")
    sources.siglip.drop(names.SIGLIP_TEXT, "the text tower and the loss")
    pool = pop_pooling_head(sources.siglip)
    problems = [p for s in sources for p in s.problems]
    notes = [n for s in sources for n in s.notes]
    cast = np.dtype(dtype) if dtype else None
    shapes: dict[str, Any] = {}
    cfg = chat = None
    if sources.llm.right_kind and sources.vae.right_kind and sources.siglip.complete:
        cfg, chat = _config(sources, gen_width, problems, notes)
    if cfg is not None:
        log(f"config: {cfg}")
        shapes = _file_shapes(cfg, sources.llm, tied)
        problems += sources.llm.misfits(names.llm_rules(tied=tied), {"llm": shapes["llm"]}, cast)
        problems += sources.siglip.misfits(
            siglip_rules(sources.siglip), {"und_encoder": shapes["und_encoder"]}, cast
        )
        problems += sources.vae.misfits(names.vae_rules(cfg.vae), shapes["vae"], cast)
    for note in notes:
        log(f"note: {note}")
    tensors.raise_problems("these folders cannot be assembled", problems)
    assert cfg is not None and chat is not None
    rows = shapes["llm"]["embedding"].shape[0]
    if cfg.llm.vocab_size > rows:
        log(f"note: the token table grows from {rows} to {cfg.llm.vocab_size} rows")
    parts = _parts(sources, cfg, shapes, tied, cast, seed, log)
    hub_files = _hub_files(sources, cfg, chat, pool)
    save_converted(out, cfg, parts, sources, hub_files, {"seed": seed}, overwrite)
    return cfg


def _config(
    sources: Sources, gen_width: int, problems: list[str], notes: list[str]
) -> tuple[ModelConfig | None, chat_format.ChatFormat | None]:
    """The model's config, its table large enough for the image tags, and the tokenizer."""
    known = len(problems)
    try:
        llm = hub_configs.llama_config_from_hf(sources.llm.config, problems, notes)
        und = siglip_config(sources.siglip, problems, notes)
        vae = hub_configs.vae_config_from_hf(sources.vae.config, problems, notes)
    except hub_configs.WRONG_TYPE as error:
        problems.append(f"a config.json has a value of the wrong type: {error}")
        return None, None
    if und is None:
        return None, None
    chat = load_chat_format(sources.llm.folder, und.num_tokens, problems)
    if chat is not None and chat.vocab_needed > llm.vocab_size:
        llm.vocab_size = -(-chat.vocab_needed // VOCAB_UNIT) * VOCAB_UNIT
    cfg = ModelConfig(
        name="assembled",
        image_size=und.image_size,
        llm=llm,
        und=und,
        gen=GenConfig(width=gen_width),
        vae=vae,
        repa=RepaConfig(layer=max(1, llm.num_layers // 4), width=llm.width),
    )
    problems += config_checks.model_problems(cfg)
    return (cfg if len(problems) == known else None), chat


def siglip_naming(source: Source) -> tuple[str, str]:
    """('timm' or 'transformers', prefix of the names); ('', '') if it is neither."""
    for prefix in ("", "visual.trunk."):
        if f"{prefix}patch_embed.proj.weight" in source.tensors:
            return "timm", prefix
    for prefix in ("vision_model.", ""):
        if f"{prefix}embeddings.patch_embedding.weight" in source.tensors:
            return "transformers", prefix
    return "", ""


def siglip_rules(source: Source) -> list[names.Rule]:
    naming, prefix = siglip_naming(source)
    return names.siglip_rules(prefix) if naming == "timm" else names.siglip_hf_rules(prefix)


def pop_pooling_head(source: Source) -> dict[str, Any]:
    """The pooling head's tensors under JanusFlow's names; {} in transformers' naming."""
    naming, prefix = siglip_naming(source)
    if naming == "transformers":
        source.drop(names.HF_POOL, "pooling head; an export gets zeros")
        return {}
    pool = source.pop(re.escape(prefix + names.POOL))
    return {f"{names.TOWER}{n.removeprefix(prefix)}": x for n, x in pool.items()}


def siglip_config(source: Source, problems: list[str], notes: list[str]) -> SiglipConfig | None:
    """The tower's sizes: from config.json in transformers' naming, from the tensors in timm's."""
    naming, prefix = siglip_naming(source)
    if naming == "transformers":
        return _siglip_config_from_hf(source, problems, notes)
    try:
        width, _, patch, _ = source.tensors[f"{prefix}patch_embed.proj.weight"].shape
        num_tokens = source.tensors[f"{prefix}pos_embed"].shape[-2]
        mlp_width = source.tensors[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        problems.append(
            f"{source.folder}: expected a SigLIP with the tensor names of transformers, timm or "
            f"open_clip; {error!r}"
        )
        return None
    blocks = {
        n.removeprefix(prefix).split(".")[1]
        for n in source.tensors
        if n.startswith(f"{prefix}blocks.")
    }
    num_heads = (source.config.get("model_args") or {}).get("num_heads") or HEADS.get(width, 0)
    if not num_heads:
        problems.append(
            f"{source.folder / 'config.json'}: expected model_args.num_heads, because the width "
            f"{width} is none of {sorted(HEADS)}"
        )
        return None
    return SiglipConfig(
        image_size=patch * math.isqrt(num_tokens),
        patch_size=patch,
        width=width,
        num_layers=len(blocks),
        num_heads=num_heads,
        mlp_width=mlp_width,
    )


def _siglip_config_from_hf(source: Source, problems: list[str], notes: list[str]) -> SiglipConfig:
    """`vision_config` of transformers; the defaults are those of its SiglipVisionConfig."""
    values = source.config.get("vision_config") or source.config
    where = f"{source.folder / 'config.json'}: "
    if not source.config:
        problems.append(f"{where}missing")
    act = values.get("hidden_act", "gelu_pytorch_tanh")
    if act not in ("gelu", "gelu_pytorch_tanh"):
        problems.append(f"{where}hidden_act: expected gelu or gelu_pytorch_tanh; got {act!r}")
    if act == "gelu_pytorch_tanh":
        notes.append(
            f"{where}JanusFlow's tower uses the exact GELU with the same weights, not the tanh "
            "approximation (features differ by about 1e-3)"
        )
    if values.get("num_channels", 3) != 3:
        problems.append(f"{where}num_channels: expected 3; got {values['num_channels']}")
    return SiglipConfig(
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 16),
        width=values.get("hidden_size", 768),
        num_layers=values.get("num_hidden_layers", 12),
        num_heads=values.get("num_attention_heads", 12),
        mlp_width=values.get("intermediate_size", 3072),
        norm_eps=values.get("layer_norm_eps", 1e-6),
    )


def _file_shapes(cfg: ModelConfig, llm: Source, tied: bool) -> dict[str, Any]:
    """Shapes of the parts in the files: the table has its own rows, and no head if it is tied."""
    shapes = tensors.published_shapes(cfg)
    rows, width = llm.config.get("vocab_size", 32000), cfg.llm.width
    text = {**shapes["llm"], "embedding": jax.ShapeDtypeStruct((rows, width), np.float32)}
    text["head"] = {"kernel": jax.ShapeDtypeStruct((width, rows), np.float32)}
    if tied:
        del text["head"]
    return {
        "llm": text,
        "und_encoder": shapes["und_encoder"],
        "vae": tensors.vae_shapes(cfg.vae),
    }


def _parts(
    sources: Sources,
    cfg: ModelConfig,
    shapes: dict[str, Any],
    tied: bool,
    dtype: Any,
    seed: int,
    log: Callable[[str], None],
) -> Iterator[tuple[str, Any]]:
    """One part after another, each read or initialized when it is asked for."""
    log("llm ...")
    rules = names.llm_rules(tied=tied)
    tree = tensors.from_torch(sources.llm.tensors, rules, {"llm": shapes["llm"]}, dtype)
    yield "llm", grow(tree.pop("llm"), cfg.llm.vocab_size)
    log("und_encoder ...")
    rules, expected = siglip_rules(sources.siglip), {"und_encoder": shapes["und_encoder"]}
    yield from tensors.from_torch(sources.siglip.tensors, rules, expected, dtype).items()
    new = [p for p in cfg.parts if p not in ("llm", "und_encoder")]
    log(f"new: {', '.join(new)} ...")

    @jax.jit  # only the new parts are computed
    def initialize(key: jax.Array) -> dict[str, Any]:
        params = janusflow.init_params(cfg, key)
        return {part: params[part] for part in new}

    for part, tree in initialize(jax.random.key(seed)).items():
        yield part, jax.tree.map(lambda x: np.asarray(x).astype(dtype or x.dtype), tree)
    log("vae ...")
    rules = names.vae_rules(cfg.vae)
    yield "vae", tensors.from_torch(sources.vae.tensors, rules, shapes["vae"], dtype)


def grow(llm: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The table and the head with `vocab_size` rows; a tied head becomes a copy of the table.

    New rows are the mean of the old ones: a new tag is then neither likely nor unlikely, and the
    old tokens' probabilities hardly change.
    """
    table = llm["embedding"]
    head = llm["head"]["kernel"] if "head" in llm else table.T
    new = vocab_size - len(table)
    if new:
        row = _mean_row(table).astype(table.dtype)
        column = _mean_row(head.T).astype(head.dtype)
        table = np.concatenate([table, np.broadcast_to(row, (new, len(row)))])
        head = np.concatenate([head, np.broadcast_to(column[:, None], (len(column), new))], axis=1)
    return {**llm, "embedding": table, "head": {"kernel": np.ascontiguousarray(head)}}


def _mean_row(table: np.ndarray, rows: int = 4096) -> np.ndarray:
    """The mean in float64, a block of rows at a time, so that no float copy of all is made."""
    total = np.zeros(table.shape[1])
    for at in range(0, len(table), rows):
        total += table[at : at + rows].astype(np.float32).sum(0)
    return total / len(table)


def _hub_files(
    sources: Sources, cfg: ModelConfig, chat: chat_format.ChatFormat, pool: dict[str, Any]
) -> dict[str, bytes]:
    """Tokenizer files with the tags in them, a processor file, the sources' configs, licenses."""
    files = sources.llm.hub_files()
    files[LLM_CONFIG_FILE] = files.pop("config.json")
    if chat.added_tags:
        files["tokenizer.json"] = chat.tokenizer.to_str(pretty=True).encode()
    processor = {
        "processor_class": "VLChatProcessor",
        **chat_format.DEFAULT_TAGS,
        "num_image_tokens": cfg.num_image_tokens,
        "add_special_token": False,
        "sft_format": "deepseek_old",
        "mask_prompt": True,
        "ignore_id": -100,
    }
    files.setdefault("processor_config.json", json.dumps(processor, indent=1).encode())
    if pool:
        files[UNUSED_FILE] = safetensors_bytes({n: np.asarray(x) for n, x in pool.items()})
    files[VAE_CONFIG_FILE] = (sources.vae.folder / "config.json").read_bytes()
    licensed = [(sources.llm, ""), (sources.siglip, "siglip."), (sources.vae, "vae.")]
    return files | license_files(licensed)
