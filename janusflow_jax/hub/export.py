"""A model folder or a training run -> the published layout, with a model card.

`DIR/` gets config.json, tokenizer and processor files, weights and README.md; `DIR/vae/` the
AutoencoderKL. What `hub_import` read comes back bit for bit.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import ModelConfig, checks as config_checks
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import configs as hub_configs, names as tensor_names, tensors
from janusflow_jax.hub.safetensors import SHARD_BYTES, Made, read_header, write_folder
from janusflow_jax.hub.source import LICENCES_FILE, LLM_CONFIG_FILE, UNUSED_FILE, VAE_CONFIG_FILE

CONFIGS = ("config.json", "preprocessor_config.json", "vae/config.json")


def export(
    model: Any,
    out: Any,
    *,
    weights: str = "ema",
    dtype: str = "",
    licence: str = "",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes `model` to the folder `out`; an interrupted export leaves nothing there.

    Args:
      model: model folder, workdir or one of its checkpoints; weights: 'ema' or 'params'.
      dtype: '' is the converted source's own types, and the arrays' where there was none.
      licence: goes into the card when no source named its own.
      shard_bytes: weights above it become several files with an index.
    Raises:
      ConvertError: what the published format has no word for, or parts that are missing.
      CheckpointError: nothing there that loads, or `out` exists.
    """
    folder = epath.Path(out).resolve()
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder}: exists; choose another path or --overwrite")
    loaded = model_folder.load_model(model, weights=weights)
    hub = {p.name: p for p in loaded.hub.iterdir()} if loaded.hub.exists() else {}
    _check(loaded, hub)
    cfg, params = loaded.cfg, jax.tree.map(np.asarray, loaded.params)
    types = loaded.meta.get("source_dtypes", {})
    pool = _pooling_head(hub, cfg, params, say)
    made = _typed(tensors.lazy_janusflow(params, cfg), types.get("janusflow", ""), dtype)
    made |= _typed(pool, "", dtype)
    vae = jax.tree.map(np.asarray, loaded.vae)
    made_vae = _typed(tensors.lazy_vae(vae, cfg.vae), types.get("vae", ""), dtype)
    configs = _configs(hub, cfg, _main_type(made))
    part = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    if part.exists():
        part.rmtree()
    (part / "vae").mkdir(parents=True)
    try:
        for name, path in hub.items():
            if name not in (UNUSED_FILE, VAE_CONFIG_FILE, LLM_CONFIG_FILE, *CONFIGS):
                where = part / "vae" / name[4:] if name.startswith("vae.") else part / name
                where.write_bytes(path.read_bytes())
        for name, data in configs.items():
            (part / name).write_bytes(data)
        files = write_folder(part, "model", made, shard_bytes)
        write_folder(part / "vae", "diffusion_pytorch_model", made_vae, shard_bytes)
        (part / "README.md").write_text(_card(loaded, hub, made, weights, licence))
    except BaseException:
        part.rmtree()
        raise
    if folder.exists():
        folder.rmtree()
    part.rename(folder)
    say(f"{folder}: {len(made)} tensors in {', '.join(files)}; vae: {len(made_vae)}")


def _check(loaded: model_folder.LoadedModel, hub: Mapping[str, Any]) -> None:
    cfg = loaded.cfg
    problems = hub_configs.unsayable(cfg) + config_checks.model_problems(cfg)
    have = set(loaded.params or {}) | ({"vae"} if loaded.vae else set())
    lacking = sorted({*tensors.published_shapes(cfg), "vae"} - have)
    problems += [f"the parts {lacking} are not in it"] if lacking else []
    problems += [
        f"hub/{n}: missing" for n in ("tokenizer.json", "tokenizer_config.json") if n not in hub
    ]
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise ConvertError(f"{loaded.source}: cannot be exported:\n{listed}")


def _typed(made: Mapping[str, Made], source: Any, dtype: str) -> dict[str, Made]:
    """The tensors in `dtype`, else in their source's (one name, or name -> type), else as is."""
    out = {}
    for name, x in made.items():
        kind = dtype or (source.get(name, "") if isinstance(source, dict) else source)
        out[name] = x._replace(dtype=tensors.numpy_dtype(kind)) if kind else x
    return out


def _pooling_head(
    hub: Mapping[str, Any], cfg: ModelConfig, params: Any, say: Callable[[str], None]
) -> dict[str, Made]:
    """SigLIP's unused tensors: as they came; zeros for a model that never had them."""
    wanted = tensor_names.pool_shapes(cfg.und)
    if UNUSED_FILE in hub:
        kept = read_header(hub[UNUSED_FILE])
        if not kept or not tensors.shape_problems(kept, wanted):
            return {n: Made(x.shape, x.dtype, lambda x=x: np.asarray(x)) for n, x in kept.items()}
        say(f"note: {UNUSED_FILE} is of another SigLIP; the pooling head is exported as zeros")
    kind = params["und_aligner"]["kernel"].dtype
    return {n: Made(s, kind, lambda s=s: np.zeros(s, kind)) for n, s in wanted.items()}


def _main_type(made: Mapping[str, Made]) -> str:
    """The type of most of the numbers."""
    total: dict[str, int] = {}
    for x in made.values():
        total[str(x.dtype)] = total.get(str(x.dtype), 0) + x.nbytes
    return max(total, key=lambda k: total[k])


def _configs(hub: Mapping[str, Any], cfg: ModelConfig, kind: str) -> dict[str, bytes]:
    """The three config files: as they came where they still describe this model, else written."""
    names = {"vae/config.json": VAE_CONFIG_FILE}
    came = {n: hub[names.get(n, n)].read_bytes() for n in CONFIGS if names.get(n, n) in hub}
    extra = json.loads(hub[LLM_CONFIG_FILE].read_bytes()) if LLM_CONFIG_FILE in hub else {}
    written = hub_configs.model_config_to_hf(cfg, extra)
    if _read_back([written[n] for n in CONFIGS]) != cfg:
        raise ConvertError("the config would not be read back as it is: a mistake of ours")
    if not {"config.json", "vae/config.json"} <= came.keys():
        written["config.json"]["torch_dtype"] = kind
        return {n: _dump(x) for n, x in written.items()}
    read = [json.loads(came.get(n, b"{}")) for n in CONFIGS]
    try:
        then = _read_back(read)
    except (ValueError, TypeError, AttributeError):
        then = None
    if then is None or not _same(then, cfg):  # born from that model with other sizes
        written["config.json"]["torch_dtype"] = kind
        return {n: _dump(x) for n, x in written.items()}
    main = read[0]
    changed = {"torch_dtype": kind} if main.get("torch_dtype", kind) != kind else {}
    if then != cfg:  # the name, REPA's head
        changed[hub_configs.OURS] = written["config.json"][hub_configs.OURS]
    return came | ({"config.json": _dump(main | changed)} if changed else {})


def _dump(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _read_back(files: list[Any]) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown keys were told when they came
        return hub_configs.model_config_from_hf(*files)


def _same(a: ModelConfig, b: ModelConfig) -> bool:
    """Equal but for the name and REPA's head, which are no part of a published model."""
    parts = ("image_size", "llm", "und", "gen", "vae")
    return all(getattr(a, n) == getattr(b, n) for n in parts)


def _card(
    loaded: model_folder.LoadedModel,
    hub: Mapping[str, Any],
    made: Mapping[str, Made],
    weights: str,
    licence: str,
) -> str:
    """The model card: what it is, how to load it, whose licence it is under."""
    cfg, meta = loaded.cfg, loaded.meta
    said = json.loads(hub[LICENCES_FILE].read_text()) if LICENCES_FILE in hub else []
    head = {"library_name": "janusflow_jax", "pipeline_tag": "any-to-any"}
    named = [{k: v for k, v in x.items() if k.startswith("license")} for x in said]
    named = [x for x in named if x]
    if named:  # of several kinds: each is told below
        head |= named[0] if all(x == named[0] for x in named) else {"license": "other"}
    if licence:
        head["license"] = licence
    lines = [f"{k}: {v}" for k, v in head.items()]
    count = sum(int(np.prod(x.shape)) for x in made.values())
    llm, und = cfg.llm, cfg.und
    born = (
        f"Trained to step {meta['step']}, `{weights}` weights."
        if "step" in meta
        else (f"Made by {meta.get('made_by', 'janusflow_jax')}.")
    )
    text = f"""# {cfg.name}

A JanusFlow ([arXiv 2411.07975](https://arxiv.org/abs/2411.07975)), exported by janusflow_jax.
{born}

- {count:,} parameters, mostly {_main_type(made)}; the VAE is in `vae/`
- pictures of {cfg.image_size} x {cfg.image_size}, {cfg.num_image_tokens} positions each
- language model: {llm.num_layers} layers of width {llm.width}, {llm.vocab_size} tokens
- SigLIP: {und.num_layers} layers of width {und.width}, patches of {und.patch_size}

```bash
python tools/convert_checkpoint.py --janusflow THIS --vae THIS/vae --out models/janusflow
python -m janusflow_jax.generate --model models/janusflow --prompt "a red apple" --out apple.png
```

## Licence

"""
    told = []
    for x in said:
        name = x.get("license_name") or x.get("license") or "see the files"
        files = ", ".join(f"`{n.replace('vae.', 'vae/', 1)}`" for n in x["files"])
        told.append(f"- {x['of']}: {name}" + (f" ({files})" if files else ""))
    if not told:
        told = [f"{licence or 'No licence was named by what this was made from.'}"]
    return "\n".join(["---", *lines, "---", "", text]) + "\n".join(told) + "\n"
