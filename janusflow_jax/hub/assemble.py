"""A Llama's, a SigLIP's and a VAE's published folders -> a model folder: the start of stage 1.

The parts that nobody published are initialised here. The language model may have grouped heads, a
tied head, and a table with no room for the image tags; SigLIP's names are transformers' or timm's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from janusflow_jax.config import (
    GenConfig,
    LlamaConfig,
    ModelConfig,
    RepaConfig,
    SiglipConfig,
    VaeConfig,
    checks as config_checks,
)
from janusflow_jax.data import chat_format
from janusflow_jax.hub import (
    configs as hub_configs,
    import_janusflow as hub_import,
    names as tensor_names,
    safetensors as safetensors_io,
    tensors,
)
from janusflow_jax.hub.import_janusflow import Say, noted
from janusflow_jax.hub.source import (
    DTYPES,
    LLM_CONFIG_FILE,
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    licence_files,
    licences,
)
from janusflow_jax.models import janusflow

VOCAB_UNIT = 128
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""SigLIP's heads by width: timm's folders do not always say."""


def siglip_naming(source: Source) -> tuple[str, str]:
    """('timm' or 'transformers', prefix); ('', '') when it is neither."""
    for prefix in ("", "visual.trunk."):
        if f"{prefix}patch_embed.proj.weight" in source.tensors:
            return "timm", prefix
    for prefix in ("vision_model.", ""):
        if f"{prefix}embeddings.patch_embedding.weight" in source.tensors:
            return "transformers", prefix
    return "", ""


def siglip_config(source: Source, problems: list[str]) -> SiglipConfig | None:
    """The tower's sizes: from config.json in transformers' naming, from the tensors in timm's."""
    naming, prefix = siglip_naming(source)
    if not naming:
        problems.append(
            f"{source.folder}: expected a SigLIP's tensors in transformers' naming "
            "(vision_model.embeddings.patch_embedding.weight ...) or timm's "
            "(patch_embed.proj.weight ...); found neither"
        )
        return None
    if naming == "transformers":
        return _hf_siglip(source, problems)
    shape = lambda name: source.tensors[f"{prefix}{name}"].shape  # noqa: E731
    try:
        width, _, patch, _ = shape("patch_embed.proj.weight")
        tokens, mlp_width = shape("pos_embed")[-2], shape("blocks.0.mlp.fc1.weight")[0]
    except (KeyError, ValueError, IndexError) as error:
        problems.append(f"{source.folder}: expected timm's SigLIP tensors; {error!r}")
        return None
    start = f"{prefix}blocks."
    blocks = {n[len(start) :].split(".")[0] for n in source.tensors if n.startswith(start)}
    heads = (source.config.get("model_args") or {}).get("num_heads") or HEADS.get(width, 0)
    if not heads:
        problems.append(
            f"{source.folder / 'config.json'}: expected model_args.num_heads, since a width of "
            f"{width} is none of {sorted(HEADS)}"
        )
        return None
    return SiglipConfig(
        image_size=patch * math.isqrt(tokens),
        patch_size=patch,
        width=width,
        num_layers=len(blocks),
        num_heads=heads,
        mlp_width=mlp_width,
    )


def _hf_siglip(source: Source, problems: list[str]) -> SiglipConfig:
    """`vision_config` of transformers; defaults are its SiglipVisionConfig's."""
    values = source.config.get("vision_config") or source.config
    where = f"{source.folder / 'config.json'}: "
    if not source.config:
        problems.append(f"{where}missing")
    act = values.get("hidden_act", "gelu_pytorch_tanh")
    if act not in ("gelu", "gelu_pytorch_tanh"):
        problems.append(f"{where}hidden_act: expected gelu or gelu_pytorch_tanh; got {act!r}")
    if act == "gelu_pytorch_tanh":
        source.notes.append(
            f"{where}its GELU is the tanh approximation; JanusFlow's tower computes the exact one "
            "with the same weights (features differ by about 1e-3)"
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


def siglip_rules(source: Source) -> list[tensor_names.Rule]:
    naming, prefix = siglip_naming(source)
    if naming == "timm":
        return tensor_names.siglip_rules(prefix)
    return tensor_names.siglip_hf_rules(prefix)


def siglip_problems(source: Source, cfg: SiglipConfig, expected: Any, dtype: Any) -> list[str]:
    """Why the tensors are no SigLIP of this config, its pooling head included."""
    pool = _pool_names(source, cfg)
    tower = {n: x for n, x in source.tensors.items() if n not in pool}
    found = tensors.problems(tower, siglip_rules(source), expected, dtype)
    have = {n: x for n, x in source.tensors.items() if n in pool}
    return found + (tensors.shape_problems(have, pool) if have else [])


def _pool_names(source: Source, cfg: SiglipConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the pooling head in the source's naming."""
    naming, prefix = siglip_naming(source)
    if naming == "timm":
        return tensor_names.pool_shapes(cfg, prefix)
    timm = tensor_names.pool_shapes(cfg, "")
    shapes = {}
    for name, parts in tensor_names.HF_POOL.items():
        first, *rest = timm[f"{tensor_names.POOL}{parts[0]}"]
        rows = first if len(parts) == 1 else 3 * first
        shapes[f"{prefix}{name}"] = (rows, *rest)
    return shapes


def pooling_head(source: Source, cfg: SiglipConfig) -> dict[str, np.ndarray]:
    """The pooling head under JanusFlow's names, for export; {} when the source has none."""
    naming, prefix = siglip_naming(source)
    ours = f"{tensor_names.TOWER}{tensor_names.POOL}"
    names = [n for n in _pool_names(source, cfg) if n in source.tensors]
    arrays = {n.removeprefix(prefix): np.asarray(source.tensors[n]) for n in names}
    if naming == "timm":
        return {f"{ours}{n.removeprefix(tensor_names.POOL)}": x for n, x in arrays.items()}
    out = {}
    for name, x in arrays.items():
        parts = tensor_names.HF_POOL[name]
        pieces = [x] if len(parts) == 1 else [x[: cfg.width], x[cfg.width :]]
        out |= {f"{ours}{p}": y for p, y in zip(parts, pieces, strict=True)}
    return out


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
    say: Say = print,
) -> ModelConfig:
    """Assembles the start of stage 1 into a model folder.

    Args:
      llm, siglip, vae: published folders.
      dtype: '' keeps each tensor's type; new parts are float32 then.
      gen_width: width of the new ConvNeXt parts; seed: of their initialisation.
    Raises:
      ConvertError: whatever is wrong with the folders, all of it; nothing was written.
      CheckpointError: `out` exists and `overwrite` is not set.
    """
    hub_import.check_out(out, overwrite)
    sources = Source(llm, "llm"), Source(siglip, "siglip"), hub_import.open_vae(vae)
    text, tower, autoencoder = sources
    text.drop(tensor_names.LLM_BUFFERS, "computed, no weights")
    tower.drop(tensor_names.SIGLIP_OTHERS, "the text tower and the loss")
    tied = bool(text.config.get("tie_word_embeddings", False))
    if tied:
        text.drop(r"lm_head\.weight$", "the head is tied to the embedding")
    notes: list[str] = []
    problems = [p for s in sources for p in s.problems]
    cfg = chat = None
    if text.right_kind and autoencoder.right_kind and tower.whole:
        cfg, chat = _config(sources, gen_width, problems, notes)
    shapes = janusflow.param_shapes(cfg) if cfg else {}
    wanted = _file_shapes(shapes, text, tied) if cfg else {}
    if cfg is not None:
        say(f"config: {cfg}")
        to = DTYPES[dtype]
        rules = tensor_names.llm_rules(tied=tied)
        found = tensors.problems(text.tensors, rules, wanted, to) if text.whole else []
        problems += [f"{text.folder}: {p}" for p in found]
        expected = {"und_encoder": shapes["und_encoder"]}
        found = siglip_problems(tower, cfg.und, expected, to)
        problems += [f"{tower.folder}: {p}" for p in found]
        if autoencoder.whole:
            found = tensors.vae_problems(autoencoder.tensors, cfg.vae, to)
            problems += [f"{autoencoder.folder}: {p}" for p in found]
    for note in [n for s in sources for n in s.notes] + notes:
        say(f"note: {note}")
    tensors.raise_problems("cannot be assembled", problems)
    assert cfg is not None and chat is not None
    rows = wanted["llm"]["embedding"].shape[0]
    if cfg.llm.vocab_size > rows:
        say(f"note: the table grows from {rows} to {cfg.llm.vocab_size} rows")
    parts = _parts(sources, cfg, shapes, wanted, tied, DTYPES[dtype], seed, say)
    extra = {
        "made_by": "tools/convert_checkpoint.py",
        "source_dtypes": {s.role: s.dtypes() for s in sources},
        "seed": seed,
    }
    hub_files = _hub_files(sources, cfg, chat)
    hub_import.save(out, cfg, parts, sources, hub_files, extra, overwrite)
    return cfg


def _config(
    sources: Any, gen_width: int, problems: list[str], notes: list[str]
) -> tuple[ModelConfig | None, chat_format.ChatFormat | None]:
    """The whole model's config, with a table that holds the tags, and the tokenizer."""
    text, tower, autoencoder = sources
    known = len(problems)

    def read() -> tuple[LlamaConfig, SiglipConfig | None, VaeConfig]:
        return (
            hub_configs.llama_config_from_hf(text.config, problems),
            siglip_config(tower, problems),
            hub_configs.vae_config_from_hf(autoencoder.config, problems),
        )

    try:
        llm, und, vae = noted(read, notes)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        problems.append(f"a config.json has a value of the wrong type: {error}")
        return None, None
    if und is None:
        return None, None
    chat = hub_import.load_text(text.folder, und.num_tokens, problems)
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


def _file_shapes(shapes: Any, text: Source, tied: bool) -> Any:
    """What the language model's file must hold: its own number of rows, no head if tied."""
    llm, rows = dict(shapes["llm"]), text.config.get("vocab_size", 32000)
    width = llm["embedding"].shape[1]
    llm["embedding"] = jax.ShapeDtypeStruct((rows, width), np.float32)
    llm["head"] = {"kernel": jax.ShapeDtypeStruct((width, rows), np.float32)}
    if tied:
        del llm["head"]
    return {"llm": llm}


def _parts(
    sources: Any,
    cfg: ModelConfig,
    shapes: Any,
    wanted: Any,
    tied: bool,
    dtype: Any,
    seed: int,
    say: Say,
) -> Iterator[tuple[str, Any]]:
    text, tower, autoencoder = sources
    fresh = [p for p in cfg.parts if p not in ("llm", "und_encoder")]
    say("llm ...")
    rules = tensor_names.llm_rules(tied=tied)
    yield "llm", grow(tensors.from_torch(text.tensors, rules, wanted, dtype)["llm"], cfg)
    say("und_encoder ...")
    expected = {"und_encoder": shapes["und_encoder"]}
    yield from tensors.from_torch(tower.tensors, siglip_rules(tower), expected, dtype).items()
    say(f"new: {', '.join(fresh)} ...")
    init = lambda key: {p: janusflow.init_params(cfg, key)[p] for p in fresh}  # noqa: E731
    for part, tree in jax.jit(init)(jax.random.key(seed)).items():
        yield part, jax.tree.map(lambda x: np.asarray(x).astype(dtype or x.dtype), tree)
    say("vae ...")
    yield "vae", tensors.vae_from_torch(autoencoder.tensors, cfg.vae, dtype)


def grow(llm: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The table and the head with `cfg.llm.vocab_size` rows; a tied head becomes one of its own.

    New rows are the mean of the old: a new tag is then neither likely nor unlikely, and the old
    tokens' probabilities hardly move.
    """
    table = llm["embedding"]
    head = llm["head"]["kernel"] if "head" in llm else table.T
    new = cfg.llm.vocab_size - len(table)
    if new:
        row = _mean_row(table).astype(table.dtype)
        column = _mean_row(head.T).astype(head.dtype)
        table = np.concatenate([table, np.broadcast_to(row, (new, len(row)))])
        head = np.concatenate([head, np.broadcast_to(column[:, None], (len(column), new))], axis=1)
    return {**llm, "embedding": table, "head": {"kernel": np.ascontiguousarray(head)}}


def _mean_row(table: np.ndarray, rows: int = 4096) -> np.ndarray:
    total = np.zeros(table.shape[1])
    for at in range(0, len(table), rows):
        total += table[at : at + rows].astype(np.float32).sum(0)
    return total / len(table)


def _hub_files(sources: Any, cfg: ModelConfig, chat: chat_format.ChatFormat) -> dict[str, bytes]:
    """Tokenizer files with the tags in them, a processor file, the sources' configs, licences."""
    text, tower, autoencoder = sources
    files = text.hub_files()
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
    if "processor_config.json" not in files:
        files["processor_config.json"] = json.dumps(processor, indent=1).encode()
    pool = pooling_head(tower, cfg.und)
    if pool:
        files[UNUSED_FILE] = safetensors_io.to_bytes(pool.items())
    files[VAE_CONFIG_FILE] = (autoencoder.folder / "config.json").read_bytes()
    files |= licence_files(tower, "siglip.") | licence_files(autoencoder, "vae.")
    return files | licences([(text, ""), (tower, "siglip."), (autoencoder, "vae.")])
