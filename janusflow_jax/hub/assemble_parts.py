"""Published folders of an LLM, a SigLIP and a VAE -> a model folder, the start of stage 1.

The other parts are initialized. The language model is of a family in `families`; its head may be
tied, and its table may lack rows for the image tags. A DeepSeek-VL may be the folder of both the
language model and the tower. SigLIP's names may be those of transformers, timm or
open_clip.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save as safetensors_bytes

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import GenConfig, ModelConfig, RepaConfig, SiglipConfig
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import configs as hub_configs, families, names, tensors, towers
from janusflow_jax.hub.source import (
    LLM_CONFIG_FILE,
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    log_missing_scale,
    open_vae,
    pop_batch_norm,
    reading_configs,
    save_converted,
)
from janusflow_jax.models import janusflow
from janusflow_jax.parallel import numerics

VOCAB_UNIT = 128
VL_TOWER = "vision_model.vision_tower."
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""SigLIP's heads by width, for timm folders that do not name them."""


def assemble(
    llm: Any,
    siglip: Any,
    vae: Any,
    out: Any,
    *,
    dtype: str = "",
    gen_width: int = 768,
    image_size: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> ModelConfig:
    """Assembles the start of stage 1 into the model folder `out`.

    Args:
      llm, siglip, vae: published folders.
      dtype: 'bfloat16' or 'float32'; '' keeps each tensor's own, and new parts are float32.
      gen_width: width of the new ConvNeXt parts; seed: of their initialization.
      image_size: in pixels; 0: the tower's own. Another one resizes its position embeddings.
      log: receives progress and remarks, a line each.
    Raises:
      ConvertError: weights, config files or tensors that do not fit; lists all tensors of a folder.
        Nothing was written.
      DataError: a tokenizer that is missing or cannot be read.
      CheckpointError: a JSON file that cannot be read, or `out` exists and `overwrite` is not set,
        is no model folder, or is not apart from what is read.
    """
    model_folder.check_out(out, overwrite, (llm, siglip, vae))
    language, tower, autoencoder = Source(llm), Source(siglip), open_vae(vae)
    language_json = open_llm(language, log)
    tied = families.is_tied(language_json)
    language.pop(names.HF_BUFFERS)
    if tied:
        language.pop(r"lm_head\.weight$")
    und, und_rules, pool = open_siglip(tower, log, image_size)
    batch_norm = pop_batch_norm(autoencoder)
    with reading_configs(language, autoencoder):
        file_llm = families.config_from_hf(language_json)
        vae_cfg = hub_configs.vae_config_from_hf(autoencoder.json("config.json"), batch_norm)
    log_missing_scale(autoencoder, vae_cfg, log)
    chat = chat_format.ChatFormat.load(language.folder, und.num_tokens)
    rows = file_llm.vocab_size
    if chat.vocab_needed > rows:
        rows = math.ceil(chat.vocab_needed / VOCAB_UNIT) * VOCAB_UNIT
        log(f"the token table grows from {file_llm.vocab_size} to {rows} rows")
    cfg = ModelConfig(
        name="assembled",
        image_size=und.image_size,
        llm=dataclasses.replace(file_llm, vocab_size=rows),
        und=und,
        gen=GenConfig(width=gen_width),
        vae=vae_cfg,
        repa=RepaConfig(layer=max(1, file_llm.num_layers // 4), width=file_llm.width),
    )
    hub_configs.check_model(cfg)
    log(f"config: {cfg}")
    # The shapes in the files: the table there has fewer rows, and grows when it is read.
    shapes = tensors.published_shapes(dataclasses.replace(cfg, llm=file_llm))
    files = {
        "llm": (
            language,
            names.llm_rules(file_llm, tied=tied, fused=families.fused_mlp(language_json)),
            {"llm": shapes["llm"]},
        ),
        "und_encoder": (tower, und_rules, {"und_encoder": shapes["und_encoder"]}),
        "vae": (autoencoder, names.vae_rules(vae_cfg), tensors.vae_shapes(vae_cfg)),
    }
    cast = np.dtype(dtype) if dtype else None
    for source, rules, expected in files.values():
        tensors.check(source.tensors, rules, expected, source.folder, cast)

    def read(name: str) -> Any:
        log(f"{name} ...")
        source, rules, expected = files[name]
        return tensors.from_torch(source.tensors, rules, expected, cast)

    def parts() -> Iterator[tuple[str, Any]]:
        """One part after another, each read or initialized when it is asked for."""
        llm = families.fold(read("llm").pop("llm"), language_json, file_llm)
        llm = with_tags(llm, rows, chat.added_ids)
        size = float(np.sqrt(np.mean(np.square(llm["embedding"][:4096], dtype=np.float32))))
        yield "llm", jax.tree.map(lambda x: x.astype(cast or x.dtype, copy=False), llm)
        del llm  # before the next part is read
        yield from read("und_encoder").items()
        for part, tree in initialize(cfg, seed, cast, log):
            yield part, tree if cfg.llm.norms == "pre" else scale_vectors(part, tree, size)
        yield "vae", read("vae")

    sources = {"llm": language, "siglip": tower, "vae": autoencoder}
    hub_files = _hub_files(language, language_json, cfg, chat, log)
    hub_files[VAE_CONFIG_FILE] = (autoencoder.folder / "config.json").read_bytes()
    if pool:
        hub_files[UNUSED_FILE] = safetensors_bytes({n: np.asarray(x) for n, x in pool.items()})
    save_converted(out, cfg, parts(), sources, hub_files, overwrite, seed=seed)
    return cfg


def open_llm(source: Source, log: Callable[[str], None]) -> dict[str, Any]:
    """A language model's config.json. Of a DeepSeek-VL or a Janus, keeps the language model."""
    values = source.json("config.json")
    if "language_config" not in values:
        return values
    prefix = "language_model."
    inside = {n.removeprefix(prefix): x for n, x in source.tensors.items() if n.startswith(prefix)}
    log(f"{source.folder}: {len(inside)} of {len(source.tensors)} tensors are its language model")
    source.tensors = inside
    return hub_configs.json_object(
        str(source.folder / "config.json"), values, "language_config", None
    )


def open_siglip(
    source: Source, log: Callable[[str], None], image_size: int = 0
) -> tuple[SiglipConfig, list[names.Rule], dict[str, Any]]:
    """A tower's config, the rules of its naming, and its pooling head under JanusFlow's names.

    Removes what a JanusFlow has no place for: the text tower, the loss, and the pooling head in
    transformers' layout. A NaFlex tower becomes one of fixed size.

    Args: image_size: as in `assemble`.
    """
    source.pop(names.SIGLIP_TEXT)
    if f"{VL_TOWER}patch_embed.proj.weight" in source.tensors:  # keep the tower of a DeepSeek-VL
        source.tensors = source.pop(re.escape(VL_TOWER))
    for prefix in ("", "visual.trunk.", VL_TOWER):
        if f"{prefix}patch_embed.proj.weight" in source.tensors:
            pool = source.pop(re.escape(prefix + names.POOL))
            pool = {f"{names.TOWER}{n.removeprefix(prefix)}": x for n, x in pool.items()}
            with reading_configs(source):
                cfg = _timm_config(source, prefix)
            cfg = _resize(source, cfg, image_size, f"{prefix}pos_embed", log)
            return cfg, names.siglip_rules(prefix), pool
    for prefix in ("vision_model.", ""):
        if f"{prefix}embeddings.patch_embedding.weight" in source.tensors:
            source.pop(names.HF_POOL)
            with reading_configs(source):
                cfg = hub_configs.siglip_vision_config_from_hf(source.json("config.json"))
            towers.to_convolution(source.tensors, f"{prefix}embeddings.patch_embedding.weight")
            positions = f"{prefix}embeddings.position_embedding.weight"
            cfg = _resize(source, cfg, image_size, positions, log)
            return cfg, names.siglip_hf_rules(prefix), {}
    raise ConvertError(
        f"{source.folder}: expected a SigLIP with the tensor names of transformers, timm or "
        f"open_clip; got {sorted(source.tensors)[:4]}"
    )


def _resize(
    source: Source, cfg: SiglipConfig, image_size: int, name: str, log: Callable[[str], None]
) -> SiglipConfig:
    """The config for images of `image_size` px (0: as it is), whose positions are resized."""
    resized = dataclasses.replace(cfg, image_size=image_size or cfg.image_size)
    if resized.num_tokens != cfg.num_tokens:
        log(f"the tower's position embeddings are resized: {cfg.image_size} to {image_size} px")
        towers.resize_positions(source.tensors, name, cfg.num_tokens, resized.num_tokens)
    return resized


def _timm_config(source: Source, prefix: str) -> SiglipConfig:
    """The tower's sizes by its tensors."""
    shapes = {n.removeprefix(prefix): x.shape for n, x in source.tensors.items()}
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    if wrong := [n for n, axes in needed.items() if len(shapes.get(n, ())) != axes]:
        raise ConvertError(
            f"{source.folder}: expected a SigLIP of fixed image size; "
            f"{', '.join(prefix + n for n in wrong)} is missing or has another number of axes"
        )
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    file = str(source.folder / "config.json")
    values = hub_configs.present(source.json("config.json", default={}))
    model_args = hub_configs.json_object(file, values, "model_args", {})
    num_heads = model_args.get("num_heads") or HEADS.get(width)
    if not num_heads:
        raise ConvertError(
            f"{file}: expected model_args.num_heads, because the width {width} is none of "
            f"{sorted(HEADS)}"
        )
    num_heads = hub_configs.numbers(file, {"num_heads": num_heads}, {"num_heads": 1})["num_heads"]
    return SiglipConfig(
        image_size=patch * math.isqrt(shapes["pos_embed"][-2]),
        patch_size=patch,
        width=width,
        num_layers=len({n.split(".")[1] for n in shapes if n.startswith("blocks.")}),
        num_heads=num_heads,
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
        act=hub_configs.siglip_act(file, model_args, "act_layer", "gelu"),
    )


def initialize(
    cfg: ModelConfig, seed: int, dtype: Any, log: Callable[[str], None]
) -> Iterator[tuple[str, Any]]:
    """The parts that come from no file, in float32 or `dtype`."""
    new = [p for p in cfg.parts if p not in ("llm", "und_encoder")]
    log(f"new: {', '.join(new)} ...")

    @jax.jit  # only the new parts are computed
    def init(key: jax.Array) -> dict[str, Any]:
        params = janusflow.init_params(cfg, key)
        return {part: params[part] for part in new}

    with numerics.fixed():
        params = init(numerics.key(seed))
    for part, tree in params.items():
        yield part, jax.tree.map(lambda x: np.asarray(x).astype(dtype or x.dtype), tree)


def with_tags(llm: dict[str, Any], vocab_size: int, new_ids: Sequence[int]) -> dict[str, Any]:
    """The table and the head with `vocab_size` rows; a tied head becomes a copy of the table.

    The rows of new tags, added or spare ones of the file's table, are the mean of the rows before
    them: a new tag is then neither likely nor unlikely, and the old tokens' probabilities hardly
    change.

    Args: new_ids: of the tags that the tokenizer did not have.
    """
    table = llm["embedding"]
    head = llm["head"]["kernel"] if "head" in llm else table.T
    old, used = len(table), min([*new_ids, len(table)])
    row = table[:used].mean(0, dtype=np.float64).astype(table.dtype)
    column = head[:, :used].mean(1, dtype=np.float64).astype(head.dtype)
    new = [*range(old, vocab_size), *(i for i in new_ids if i < old)]
    table = np.concatenate([table, np.empty((vocab_size - old, len(row)), table.dtype)])
    head = np.concatenate([head, np.empty((len(column), vocab_size - old), head.dtype)], axis=1)
    table[new], head[:, new] = row, column[:, None]
    return {**llm, "embedding": table, "head": {"kernel": np.ascontiguousarray(head)}}


def scale_vectors(part: str, tree: dict[str, Any], size: float) -> dict[str, Any]:
    """New parts whose vectors have the size of the token table's rows.

    The first block of a model with norms of outputs reads the vectors as they are: an image's of
    size 1 would hide the text.
    """
    whole = part in ("und_aligner", "gen_aligner", "und_begin")
    times = lambda x: (x * size).astype(x.dtype)  # noqa: E731
    if whole:
        return jax.tree.map(times, tree)
    if part != "gen_encoder":
        return tree
    time = tree["time_embed"]
    return {
        **tree,
        "time_embed": {**time, "linear_2": jax.tree.map(times, time["linear_2"])},
    }


def _bos(chat: chat_format.ChatFormat, config: Mapping[str, Any]) -> str:
    """What a model without a BOS of its own has seen before every document, and guidance keeps:
    the token that its config or its name says, else EOS."""
    special = {i: t.content for i, t in chat.tokenizer.get_added_tokens_decoder().items()}
    number = config.get("bos_token_id")
    stated = special.get(chat.bos_id) or (special.get(number) if isinstance(number, int) else None)
    common = "<|endoftext|>"
    return stated or (common if common in special.values() else special[chat.eos_id])


def _hub_files(
    llm: Source,
    values: Mapping[str, Any],
    cfg: ModelConfig,
    chat: chat_format.ChatFormat,
    log: Callable[[str], None],
) -> dict[str, bytes]:
    """The language model's files, with tags and a BOS in its tokenizer, and a processor file.

    Args: values: its config.json.
    """
    files = llm.hub_files()
    config = files.pop("config.json")
    files[LLM_CONFIG_FILE] = config
    if json.loads(config) != values:  # of a DeepSeek-VL: what describes its own images goes too
        files[LLM_CONFIG_FILE] = json.dumps(values, indent=1).encode()
        files.pop("processor_config.json", None)
        files.pop("preprocessor_config.json", None)
    if chat.added_tags:
        files["tokenizer.json"] = chat.tokenizer.to_str(pretty=True).encode()
    if not chat.add_bos:
        bos = _bos(chat, values)
        log(f"the tokenizer adds no BOS: every text begins with {bos!r} from now on")
        config = llm.json("tokenizer_config.json") | {"bos_token": bos, "add_bos_token": True}
        files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
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
    return files
