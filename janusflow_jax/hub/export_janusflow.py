"""A model folder or a training run -> the published layout, with a model card.

The folder gets config.json, tokenizer and processor files, weights and README.md, and below `vae/`
the AutoencoderKL. A model that `import_janusflow` has read comes back bit for bit.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from huggingface_hub import ModelCardData

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import ModelConfig, SiglipConfig, checks as config_checks, files
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import configs as hub_configs, names, tensors
from janusflow_jax.hub.safetensors import SHARD_BYTES, LazyTensor, read_header, write_folder
from janusflow_jax.hub.source import LICENSES_FILE, LLM_CONFIG_FILE, UNUSED_FILE, VAE_CONFIG_FILE

CONFIGS = ("config.json", "preprocessor_config.json", "vae/config.json")
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
      ConvertError: what the published format cannot hold, or parts that are missing.
      CheckpointError: no model that loads, or `out` exists.
    """
    folder = epath.Path(out).resolve()
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder}: exists; choose another path, or overwrite it")
    loaded = model_folder.load_model(model, weights=weights)
    hub = {p.name: p for p in loaded.hub.iterdir()} if loaded.hub.exists() else {}
    _check(loaded, hub)
    cfg = loaded.cfg
    params, vae = jax.tree.map(np.asarray, ({**(loaded.params or {})}, loaded.vae))
    params.pop("repa_head", None)
    types = loaded.meta.get("source_dtypes", {})
    published = tensors.to_torch(
        params, names.janusflow_rules(cfg), tensors.published_shapes(cfg), "JanusFlow"
    )
    published = _cast(published, types.get("janusflow", ""), dtype)
    published |= _cast(
        _pooling_head(hub, cfg.und, params["und_aligner"]["kernel"].dtype), "", dtype
    )
    published_vae = _cast(
        tensors.to_torch(vae, names.vae_rules(cfg.vae), tensors.vae_shapes(cfg.vae), "VAE"),
        types.get("vae", ""),
        dtype,
    )
    with files.replacing(folder) as part:
        (part / "vae").mkdir(parents=True)
        for name, path in hub.items():
            if name not in (UNUSED_FILE, VAE_CONFIG_FILE, LLM_CONFIG_FILE, *CONFIGS):
                (part / _exported_name(name)).write_bytes(path.read_bytes())
        for name, data in _configs(hub, cfg, _main_dtype(published)).items():
            (part / name).write_bytes(data)
        shards = write_folder(part, "model", published, shard_bytes)
        write_folder(part / "vae", "diffusion_pytorch_model", published_vae, shard_bytes)
        (part / "README.md").write_text(_card(loaded, hub, published, weights, license))
    log(f"{folder}: {len(published)} tensors in {', '.join(shards)}; vae: {len(published_vae)}")


def _exported_name(name: str) -> str:
    """Where a file of `hub/` goes: the VAE's licenses, called 'vae.LICENSE', to `vae/`."""
    return name.replace("vae.", "vae/", 1) if name.startswith("vae.") else name


def _check(loaded: model_folder.LoadedModel, hub: Files) -> None:
    cfg = loaded.cfg
    problems = hub_configs.export_problems(cfg) + config_checks.model_problems(cfg)
    missing = sorted({*tensors.published_shapes(cfg), "vae"} - {*loaded.parts})
    problems += [f"parts {missing}: missing"] if missing else []
    required = ("tokenizer.json", "tokenizer_config.json")
    problems += [f"hub/{n}: missing" for n in required if n not in hub]
    tensors.raise_problems(f"{loaded.source}: cannot be exported", problems)


def _cast(published: Mapping[str, LazyTensor], source: Any, dtype: str) -> dict[str, LazyTensor]:
    """The tensors in `dtype`, else in their source's (one name, or tensor -> name), else as is."""
    out = {}
    for name, x in published.items():
        kind = dtype or (source.get(name, "") if isinstance(source, dict) else source)
        out[name] = LazyTensor(x.shape, np.dtype(kind or x.dtype), x.load)
    return out


def _pooling_head(hub: Files, cfg: SiglipConfig, dtype: np.dtype) -> dict[str, LazyTensor]:
    """SigLIP's unused tensors as they came, or zeros if none came with this SigLIP."""
    shapes = names.pool_shapes(cfg)
    if UNUSED_FILE in hub:
        stored = read_header(hub[UNUSED_FILE])
        # A source without a pooling head has an empty file here, and gets none back.
        if not stored or {n: x.shape for n, x in stored.items()} == shapes:
            return stored
    return {
        n: LazyTensor(shape, dtype, functools.partial(np.zeros, shape, dtype))
        for n, shape in shapes.items()
    }


def _main_dtype(published: Mapping[str, LazyTensor]) -> str:
    """The dtype of most bytes."""
    sizes: dict[str, int] = {}
    for x in published.values():
        sizes[str(x.dtype)] = sizes.get(str(x.dtype), 0) + x.nbytes
    return max(sizes, key=lambda kind: sizes[kind])


def _configs(hub: Files, cfg: ModelConfig, dtype: str) -> dict[str, bytes]:
    """The three config files: the source's if they still describe this model, else new ones."""
    llm_extra = json.loads(hub[LLM_CONFIG_FILE].read_bytes()) if LLM_CONFIG_FILE in hub else {}
    new = hub_configs.model_config_to_hf(cfg, llm_extra)
    if _read_config([new[n] for n in CONFIGS]) != cfg:
        raise ConvertError("the published config files cannot describe this model's config")
    source = {
        name: hub[file].read_bytes()
        for name, file in zip(CONFIGS, (*CONFIGS[:2], VAE_CONFIG_FILE), strict=True)
        if file in hub
    }
    parsed = [json.loads(source.get(n, b"{}")) for n in CONFIGS]
    described = _read_config(parsed) if {CONFIGS[0], CONFIGS[2]} <= source.keys() else None
    # The name and REPA's head are no part of a published model; all else must be the same.
    parts = ("image_size", "llm", "und", "gen", "vae")
    if described is None or any(getattr(described, n) != getattr(cfg, n) for n in parts):
        new["config.json"]["torch_dtype"] = dtype
        return {n: _to_json(x) for n, x in new.items()}
    main = dict(parsed[0])
    if "torch_dtype" in main:
        main["torch_dtype"] = dtype
    if described != cfg:
        main[hub_configs.OURS] = new["config.json"][hub_configs.OURS]
    return source if main == parsed[0] else {**source, "config.json": _to_json(main)}


def _to_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _read_config(files: list[Any]) -> ModelConfig | None:
    return hub_configs.model_config_from_hf(*files, problems=[], notes=[])


def _card(
    loaded: model_folder.LoadedModel,
    hub: Files,
    published: Mapping[str, LazyTensor],
    weights: str,
    license: str,
) -> str:
    """The model card: what the model is, how to load it, and its license."""
    cfg, meta = loaded.cfg, loaded.meta
    sources = json.loads(hub[LICENSES_FILE].read_text()) if LICENSES_FILE in hub else []
    named = [{k: v for k, v in s.items() if k.startswith("license")} for s in sources]
    named = [fields for fields in named if fields]
    head: dict[str, Any] = {"library_name": "janusflow_jax", "pipeline_tag": "any-to-any"}
    if named:  # sources with different licenses are listed below
        head |= named[0] if all(x == named[0] for x in named) else {"license": "other"}
    if license:
        head["license"] = license
    origin = (
        f"Trained to step {meta['step']}, `{weights}` weights."
        if "step" in meta
        else f"Made by {meta.get('made_by', 'janusflow_jax')}."
    )
    licenses = []
    for source in sources:
        name = source.get("license_name") or source.get("license") or "see the files"
        files = ", ".join(f"`{_exported_name(n)}`" for n in source["files"])
        licenses.append(f"- {source['of']}: {name}" + (f" ({files})" if files else ""))
    if not licenses:
        licenses = [license or "The sources of this model named no license."]
    count = sum(int(np.prod(x.shape)) for x in published.values())
    llm, und = cfg.llm, cfg.und
    return f"""---
{ModelCardData(**head).to_yaml()}
---

# {cfg.name}

A JanusFlow ([arXiv 2411.07975](https://arxiv.org/abs/2411.07975)), exported by janusflow_jax.
{origin}

- {count:,} parameters, mostly {_main_dtype(published)}; the VAE is in `vae/`
- images of {cfg.image_size} x {cfg.image_size}, {cfg.num_image_tokens} positions each
- language model: {llm.num_layers} layers of width {llm.width}, {llm.vocab_size} tokens
- SigLIP: {und.num_layers} layers of width {und.width}, patches of {und.patch_size}

```bash
python tools/convert_checkpoint.py --janusflow THIS --vae THIS/vae --out models/janusflow
python -m janusflow_jax.generate --model models/janusflow --prompt "a red apple" --out apple.png
```

## License

{chr(10).join(licenses)}
"""
