"""A model folder or a training run -> a folder to publish, with a model card.

It has the released layout where that can describe the model: config.json, tokenizer and processor
files, weights, and below `vae/` the AutoencoderKL. Another model is written in parts
(`parts_layout`). A model that `import_janusflow` has read comes back bit for bit.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from huggingface_hub import ModelCardData

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import ModelConfig, files
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import configs as hub_configs, names, parts_layout, tensors
from janusflow_jax.hub.safetensors import SHARD_BYTES, LazyTensor, open_file, write_folder
from janusflow_jax.hub.source import LICENSES_FILE, LLM_CONFIG_FILE, UNUSED_FILE, VAE_CONFIG_FILE

CONFIGS = {
    "config.json": "config.json",
    "preprocessor_config.json": "preprocessor_config.json",
    "vae/config.json": VAE_CONFIG_FILE,
}
"""The published config files, and their names in a model folder's `hub/`."""

_WRITTEN = (
    "README.md vae llm siglip "
    "model.safetensors model-*-of-*.safetensors model.safetensors.index.json "
    "config.json generation_config.json preprocessor_config.json processor_config.json "
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json vocab.txt merges.txt chat_template.json chat_template.jinja "
    f"{LICENSES_FILE} "
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]* [Nn][Oo][Tt][Ii][Cc][Ee]* [Cc][Oo][Pp][Yy]*"
).split()
"""Patterns of the names in an exported folder. `*.json` would include files of the user."""

_PARTS = """\
- each part opens alone: `llm/` with AutoModelForCausalLM and AutoTokenizer of transformers,
  `siglip/` with its SiglipVisionModel, `vae/` with the class of diffusers in its config.json
"""

_STUDENT = """\
- generates in {steps} steps without guidance, by janusflow_jax alone: another sampler would give
  its decoder the wrong time
"""

Files = Mapping[str, epath.Path]


def export(
    model: Any,
    out: Any,
    *,
    weights: str = "ema",
    dtype: str = "",
    license: str = "",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Writes `model` to the folder `out`. An interrupted export leaves nothing there.

    Args:
      model: model folder, workdir or one of its checkpoints; weights: 'ema' or 'params'.
      dtype: 'bfloat16' or 'float32'; '' is that of the converted source, else of the arrays.
      license: for the model card; '' takes what the sources named.
      shard_bytes: size of the largest weights file.
    Raises:
      ConvertError: what no layout can hold, or parts that are missing.
      CheckpointError: no model that loads, `out` exists and `overwrite` is not set, or it is no
        exported folder or not apart from the model.
    """
    folder = files.resolve(out)
    mark = "README.md", "library_name: janusflow_jax"
    if problem := files.problem_of_out(folder, overwrite, mark, _WRITTEN, [model]):
        raise CheckpointError(problem)
    loaded = model_folder.load_model(model, weights=weights)
    cfg = loaded.cfg
    hub = {p.name: p for p in loaded.hub.iterdir()} if loaded.hub.exists() else {}
    hub_configs.check_exportable(cfg)
    not_released = hub_configs.not_released(cfg)
    if missing := sorted({*tensors.published_shapes(cfg), "vae"} - {*loaded.parts}):
        raise ConvertError(f"{loaded.source}: cannot be exported: parts {missing} are missing")
    if "tokenizer.json" not in hub:
        raise ConvertError(f"{loaded.source}: cannot be exported: hub/tokenizer.json is missing")

    for line in not_released:
        log(f"exported in parts, because the released format cannot hold {line}")
    write = _in_parts if not_released else _as_released
    weights_of, others = write(loaded, hub, dtype)
    model_tensors = [
        x for name, of_folder in weights_of.items() if name != "vae" for x in of_folder.values()
    ]
    card = _card(loaded, hub, model_tensors, weights, license, bool(not_released))

    with files.replacing(folder) as part:
        for name, data in {**others, "README.md": card.encode()}.items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for name, of_folder in weights_of.items():
            (part / name).mkdir(parents=True, exist_ok=True)
            stem = "diffusion_pytorch_model" if name == "vae" else "model"
            shards = write_folder(part / name, stem, of_folder, shard_bytes)
            log(f"{folder / name}: {len(of_folder)} tensors in {', '.join(shards)}")


Tensors = dict[str, dict[str, LazyTensor]]
"""Folder ('': the top) -> its tensors by name."""


def _as_released(
    loaded: model_folder.LoadedModel, hub: Files, dtype: str
) -> tuple[Tensors, dict[str, bytes]]:
    """The tensors, and the other files by their path, in the released layout."""
    cfg, types = loaded.cfg, loaded.meta.get("source_dtypes", {})
    published = tensors.to_torch(loaded.params, names.janusflow_rules(cfg))
    published = _cast(published, types.get("janusflow", ""), dtype)
    # SigLIP's pooling head as it came, unless it is another tower's: a run copies `hub/` whole.
    pool = open_file(hub[UNUSED_FILE]) if UNUSED_FILE in hub else {}
    latent = pool.get(f"{names.TOWER}{names.POOL}latent")
    if latent is not None and latent.shape[-1] == cfg.und.width:
        published |= _cast(pool, "", dtype)
    published_vae = tensors.to_torch(loaded.vae, names.vae_rules(cfg.vae))
    published_vae = _cast(published_vae, types.get("vae", ""), dtype)
    copied = {
        _exported_name(name): path.read_bytes()
        for name, path in hub.items()
        if name not in (UNUSED_FILE, LLM_CONFIG_FILE, *CONFIGS.values())
    }
    written = _config_files(hub, cfg, _main_dtype(published.values()))
    return {"": published, "vae": published_vae}, copied | written


def _in_parts(
    loaded: model_folder.LoadedModel, hub: Files, dtype: str
) -> tuple[Tensors, dict[str, bytes]]:
    """`_as_released` in the layout of parts."""
    cfg = loaded.cfg
    out = parts_layout.to_tensors(cfg, loaded.params, loaded.vae)
    out = {folder: _cast(of_folder, "", dtype) for folder, of_folder in out.items()}
    dtypes = {folder: _main_dtype(of_folder.values()) for folder, of_folder in out.items()}
    contents = {name: path.read_bytes() for name, path in hub.items()}
    chat = chat_format.ChatFormat.load(loaded.hub, cfg.num_image_tokens)
    tokens = {"bos_token_id": chat.bos_id, "eos_token_id": chat.eos_id, "pad_token_id": chat.pad_id}
    tokens = {key: token for key, token in tokens.items() if token >= 0}
    others = parts_layout.config_files(cfg, contents, dtypes, tokens)
    out["vae"] |= parts_layout.batch_norm_tensors(cfg, others["vae/config.json"])
    return out, others


def _main_dtype(weights: Iterable[LazyTensor]) -> str:
    """The dtype of most bytes."""
    sizes = collections.Counter()
    for x in weights:
        sizes[str(x.dtype)] += x.nbytes
    return sizes.most_common(1)[0][0]


def _exported_name(name: str) -> str:
    """Where a file of `hub/` goes: the VAE's licenses, called 'vae.LICENSE', to `vae/`."""
    return name.replace("vae.", "vae/", 1) if name.startswith("vae.") else name


def _cast(published: Mapping[str, LazyTensor], source: Any, dtype: str) -> dict[str, LazyTensor]:
    """The tensors in `dtype`, else in their source's (one name, or tensor -> name), else as is."""
    out = {}
    for name, x in published.items():
        kind = dtype or (source.get(name, "") if isinstance(source, dict) else source)
        out[name] = dataclasses.replace(x, dtype=np.dtype(kind or x.dtype))
    return out


def _config_files(hub: Files, cfg: ModelConfig, dtype: str) -> dict[str, bytes]:
    """The config files: byte for byte the source's if they still describe this model.

    A model's name and REPA's head are no part of a published model.
    """
    llm_extra = json.loads(hub[LLM_CONFIG_FILE].read_bytes()) if LLM_CONFIG_FILE in hub else {}
    new = hub_configs.model_config_to_hf(cfg, llm_extra)
    if hub_configs.model_config_from_hf(*new.values()) != cfg:
        raise ConvertError(f"{cfg.name}: the published config files cannot describe this model")
    source = {name: hub[file].read_bytes() for name, file in CONFIGS.items() if file in hub}
    if source.keys() >= {"config.json", "vae/config.json"}:
        main, preprocessor, vae = (json.loads(source.get(name, b"{}")) for name in CONFIGS)
        described = hub_configs.model_config_from_hf(main, preprocessor, vae)
        if dataclasses.replace(described, name=cfg.name, repa=cfg.repa, student=cfg.student) == cfg:
            changed = dict(main)
            if "torch_dtype" in main:
                changed["torch_dtype"] = dtype
            if described != cfg:
                changed[hub_configs.OURS] = new["config.json"][hub_configs.OURS]
            if changed == main:
                return source
            return {**source, "config.json": parts_layout.to_json(changed)}
    new["config.json"]["torch_dtype"] = dtype
    return {name: parts_layout.to_json(values) for name, values in new.items()}


def _card(
    loaded: model_folder.LoadedModel,
    hub: Files,
    model_tensors: Sequence[LazyTensor],
    weights: str,
    license: str,
    in_parts: bool,
) -> str:
    """The model card: what the model is, how to load it, and its license."""
    cfg, meta = loaded.cfg, loaded.meta
    sources = json.loads(hub[LICENSES_FILE].read_text()) if LICENSES_FILE in hub else []
    named = [{k: v for k, v in s.items() if k.startswith("license")} for s in sources]
    named = [{"license": license}] if license else [fields for fields in named if fields]
    head: dict[str, Any] = {}
    if named:  # sources with different licenses are listed below
        head = named[0] if all(x == named[0] for x in named) else {"license": "other"}
    origin = (
        f"Trained to step {meta['step']}, `{weights}` weights."
        if "step" in meta
        else f"Made by {meta.get('made_by', 'janusflow_jax')}."
    )
    licenses = []
    for source in sources:
        name = source.get("license_name") or source.get("license") or "see the files"
        path = parts_layout.path_of if in_parts else _exported_name
        texts = ", ".join(f"`{path(n)}`" for n in source["files"])
        licenses.append(f"- {source['of']}: {name}" + (f" ({texts})" if texts else ""))
    if not licenses:
        licenses = [license or "The sources of this model named no license."]
    count = sum(math.prod(x.shape) for x in model_tensors)
    llm, und = cfg.llm, cfg.und
    return f"""---
{ModelCardData(library_name="janusflow_jax", pipeline_tag="any-to-any", **head).to_yaml()}
---

# {cfg.name}

A JanusFlow ([arXiv 2411.07975](https://arxiv.org/abs/2411.07975)), exported by janusflow_jax.
{origin}

- {count:,} parameters, mostly {_main_dtype(model_tensors)}; the VAE is in `vae/`
- images of {cfg.image_size} x {cfg.image_size}, {cfg.num_image_tokens} positions each
- language model: {llm.num_layers} layers of width {llm.width}, {llm.vocab_size} tokens
- SigLIP: {und.num_layers} layers of width {und.width}, patches of {und.patch_size}
{_STUDENT.format(steps=cfg.student.steps) if cfg.student.steps else ""}\
{_PARTS if in_parts else ""}
```bash
python tools/convert_checkpoint.py --janusflow THIS --vae THIS/vae --out models/janusflow
python -m janusflow_jax.generate --model models/janusflow --prompt "a red apple" --out apple.png
```

## License

{chr(10).join(licenses)}
"""
