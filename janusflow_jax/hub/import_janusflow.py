"""A published JanusFlow folder -> a model folder: checked as a whole, then moved part by part."""

from __future__ import annotations

import concurrent.futures
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import MODEL_PARTS, ModelConfig
from janusflow_jax.config.errors import CheckpointError, ConfigError, DataError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import (
    configs as hub_configs,
    safetensors as safetensors_io,
    tensors as convert,
)
from janusflow_jax.hub.source import (
    DTYPES,
    UNUSED_FILE,
    VAE_CONFIG_FILE,
    Source,
    licence_files,
    licences,
)

VAE_NAMES = ("diffusion_pytorch_model",)
Say = Callable[[str], None]


def noted(make: Callable[[], Any], notes: list[str]) -> Any:
    """Calls `make`; the warnings of our own modules become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        out = make()
    notes += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return out


def open_vae(path: Any) -> Source:
    """An AutoencoderKL's folder; a whole pipeline's folder gets a hint."""
    source = Source(path, "vae", VAE_NAMES)
    if not source.files and (source.folder / "vae" / "config.json").exists():
        source.problems.append(f"{source.folder}: the VAE is in {source.folder / 'vae'}; name that")
    return source


def check_out(out: Any, overwrite: bool) -> None:
    """Raises CheckpointError before any work is done when something is in the way."""
    path = epath.Path(out).resolve()
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists; choose another path or pass --overwrite")


def load_text(
    folder: epath.Path, num_image_tokens: int, problems: list[str]
) -> chat_format.ChatFormat | None:
    """The folder's tokenizer, or None and a problem."""
    try:
        return chat_format.ChatFormat.load(folder, num_image_tokens)
    except DataError as error:
        problems.append(str(error).replace("\n", " "))
    except Exception as error:  # noqa: BLE001 - the library raises its own and plain Exception
        problems.append(f"{folder}: its tokenizer files cannot be read; {error}")
    return None


def save(
    out: Any,
    cfg: ModelConfig,
    parts: Iterator[tuple[str, Any]],
    sources: Sequence[Source],
    hub_files: dict[str, bytes],
    extra: dict[str, Any],
    overwrite: bool,
) -> None:
    """Writes the model folder while the sources' checksums are computed beside it."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    sums = [(s.role, pool.submit(s.sums)) for s in sources]
    try:
        model_folder.save_parts(
            out,
            model_cfg=cfg,
            parts=parts,
            hub_files=hub_files,
            extra=lambda: {**extra, "source_sha256": {role: x.result() for role, x in sums}},
            overwrite=overwrite,
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def convert_janusflow(
    folder: Any,
    vae: Any,
    out: Any,
    *,
    dtype: str = "",
    overwrite: bool = False,
    say: Say = print,
) -> ModelConfig:
    """Converts a published JanusFlow folder and a VAE's into a model folder.

    Args:
      folder: config.json, tokenizer and processor files, weights in one file or in shards.
      vae: diffusers' AutoencoderKL; its `diffusion_pytorch_model` counts, other files do not.
      dtype: '' keeps each tensor's type, and only then does an export give every bit back.
      say: gets lines for people.
    Raises:
      ConvertError: whatever is wrong with the folders, all of it; nothing was written.
      CheckpointError: `out` exists and `overwrite` is not set.
    """
    check_out(out, overwrite)
    model, autoencoder = Source(folder, "janusflow"), open_vae(vae)
    notes = model.notes + autoencoder.notes
    problems = model.problems + autoencoder.problems
    processor = model.json("processor_config.json") if model.config else {}
    cfg = None
    if model.right_kind and autoencoder.right_kind:
        pictures = model.json("preprocessor_config.json")
        try:
            cfg = noted(
                lambda: hub_configs.model_config_from_hf(
                    model.config, pictures, autoencoder.config
                ),
                notes,
            )
        except (ConfigError, TypeError, AttributeError, ZeroDivisionError) as error:
            problems.append(f"{model.folder}: {error}")
    if cfg is not None:
        say(f"config: {cfg}")
        to = DTYPES[dtype]
        if model.whole:
            problems += convert.janusflow_problems(model.tensors, cfg, to)
        if autoencoder.whole:
            found = convert.vae_problems(autoencoder.tensors, cfg.vae, to)
            problems += [f"VAE: {p}" for p in found]
        problems += _text_problems(model, processor, cfg)
    for note in notes:
        say(f"note: {note}")
    convert.raise_problems(f"{model.folder}: cannot be converted", problems)
    assert cfg is not None
    used, pool = convert.split_pool(model.tensors)
    if not pool:
        say("note: no pooling head in the file; an export will have none")
    unused = safetensors_io.to_bytes((n, np.asarray(x)) for n, x in pool.items())
    hub_files = model.hub_files() | {
        VAE_CONFIG_FILE: (autoencoder.folder / "config.json").read_bytes(),
        UNUSED_FILE: unused,
        **licence_files(autoencoder, "vae."),
        **licences([(model, ""), (autoencoder, "vae.")]),
    }
    extra = {
        "made_by": "tools/convert_checkpoint.py",
        "source_dtypes": {"janusflow": model.dtypes(used), "vae": autoencoder.dtypes()},
    }
    parts = _parts(used, autoencoder.tensors, cfg, DTYPES[dtype], say)
    save(out, cfg, parts, (model, autoencoder), hub_files, extra, overwrite)
    return cfg


def _text_problems(model: Source, processor: dict[str, Any], cfg: ModelConfig) -> list[str]:
    problems: list[str] = []
    chat = load_text(model.folder, cfg.num_image_tokens, problems)
    if chat is not None:
        try:
            chat.check_vocab(cfg.llm.vocab_size)
        except DataError as error:
            problems.append(str(error))
    count = processor.get("num_image_tokens", cfg.num_image_tokens)
    if count != cfg.num_image_tokens:
        problems.append(
            f"{model.folder / 'processor_config.json'}: num_image_tokens: expected "
            f"{cfg.num_image_tokens} (image_size {cfg.image_size}); got {count}"
        )
    return problems


def _parts(
    tensors: Any, vae_tensors: Any, cfg: ModelConfig, dtype: Any, say: Say
) -> Iterator[tuple[str, Any]]:
    """One part after another, each read when it is asked for."""
    rules, shapes = convert.janusflow_rules(cfg), convert.published_shapes(cfg)
    for part in (p for p in MODEL_PARTS if p in shapes):
        say(f"{part} ...")
        expected = {part: shapes[part]}
        yield (
            part,
            convert.from_torch(tensors, convert.rules_of(rules, part), expected, dtype)[part],
        )
    say("vae ...")
    yield "vae", convert.vae_from_torch(vae_tensors, cfg.vae, dtype)
