"""Where a run's parameters come from: every part from a folder that `init` or `start` names, or
fresh; and what the run needs on disk, said before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import jax
import numpy as np
from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import model_folder, workdir as workdir_lib
from janusflow_jax.config import ModelConfig, TrainConfig, parts as parts_lib
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.data import sources
from janusflow_jax.models import janusflow, lora, vae
from janusflow_jax.parallel import processes, trees
from janusflow_jax.training import optim


def origins_of(cfg: TrainConfig, loaded: dict[str, model_folder.LoadedModel]) -> dict[str, str]:
    """Part -> 'fresh' or the path that it comes from.

    A `repa_target` comes from a folder's und_encoder where it has no such part: both are SigLIPs.

    Args: loaded: path -> model, where `start` is put.
    """
    out = dict.fromkeys([*cfg.model.parts, "vae"], "fresh")
    if cfg.start:
        loaded[cfg.start] = model_folder.load_model(cfg.start, weights="ema")
        has = loaded[cfg.start].parts
        given = {*has, "repa_target"} if "und_encoder" in has else {*has}
        out |= {part: cfg.start for part in out if part in given}
    return out | dict(cfg.init)


def of_workdir(cfg: TrainConfig, workdir: epath.Path) -> tuple[TrainConfig, bool]:
    """What a run in this folder starts from: `cfg`'s own start, or what the folder has of it.

    A run goes on with the VAE and the tokenizer of its `base/`, whatever lies at `start` by now.
    Once it has a checkpoint, that has the other parts, and `start` need not be there any more.

    Returns: the config with `start`, `init` and `tokenizer` as they are to be read; whether a
      checkpoint will overwrite what is fresh by it.
    """
    base = workdir / "base"
    if not model_folder.is_model(base):
        return cfg, False
    resumed = bool(model_folder.committed_steps(workdir))
    given = {"init": (), "start": str(base), "tokenizer": str(base / "hub")}
    if not (resumed or workdir_lib.start_of(workdir)):
        others = tuple((part, path) for part, path in cfg.init if part != "vae")
        given |= {"init": (*others, ("vae", str(base))), "start": cfg.start}
    return dataclasses.replace(cfg, **given, allow_fresh=cfg.allow_fresh or resumed), resumed


def initial_params(cfg: TrainConfig) -> tuple[Any, Any, str, dict[str, str]]:
    """Every part from where `init` or `start` says.

    Returns: params, VAE params, the folder of tokenizer files, part -> origin.
    Raises:
      ConfigError: a part that must have learned something is fresh, its path lacks it or has it of
        another config, or a path of `train_parts` is none of the model's.
    """
    cache: dict[str, model_folder.LoadedModel] = {}
    origins = origins_of(cfg, cache)
    must = [p for p in config_lib.PRETRAINED_PARTS if p in origins]
    if cfg.model.und_encoder == "own":  # fresh, it begins with the VAE's encoder
        must.remove("und_encoder")
    fresh = [p for p in must if origins[p] == "fresh"]
    if fresh and not cfg.allow_fresh:
        raise ConfigError(
            f"init: the parts {fresh} would start from random numbers, and training could not "
            "make up for it; expected a path for each (--config.init) or for all "
            "(--config.start), made by experiments/starts/train_vae.py, "
            "experiments/starts/pretrain_tiny.py or "
            "tools/convert_checkpoint.py"
        )
    key = jax.random.key(cfg.seed)
    params = dict(jax.jit(janusflow.init_params, static_argnums=0)(cfg.model, key))
    vae_params: Any = None
    if origins["vae"] == "fresh":
        vae_params = jax.jit(vae.init_params, static_argnums=0)(cfg.model.vae, key)
    problems, hub = _unmatched(cfg, params), cfg.tokenizer
    for path in dict.fromkeys(v for v in origins.values() if v != "fresh"):
        parts = [p for p, origin in origins.items() if origin == path]
        loaded = cache.get(path) or model_folder.load_model(path, weights="ema")
        for part in parts:
            got = _part_of(loaded, part)
            if got is None:
                problems.append(f"{path} has no part {part!r}; it has {loaded.parts}")
            elif part == "vae":
                expect = vae.param_shapes(cfg.model.vae)
                problems += trees.mismatches(expect, got, "vae") or (
                    _other_config(cfg.model, loaded.cfg, part, path)
                )
                vae_params = _host(got)
            else:
                problems += trees.mismatches(params[part], got, part) or (
                    _other_config(cfg.model, loaded.cfg, part, path)
                )
                params[part] = _host(got)
        if not hub and "llm" in parts:
            hub = str(loaded.hub)
    config_lib.raise_problems("init", problems)
    if not hub:
        raise ConfigError(
            "tokenizer: expected a folder with tokenizer.json and processor_config.json (a "
            "model folder's hub/); got '' and no `init` of the llm to take it from"
        )
    if cfg.model.und_encoder == "own" and origins["und_encoder"] == "fresh":
        encoder = {k: vae_params[k] for k in params["und_encoder"]["vae"]}  # its own copy
        params["und_encoder"] = {**params["und_encoder"], "vae": jax.tree.map(np.array, encoder)}
        origins["und_encoder"] = "the VAE's encoder, and fresh blocks"
    return params, vae_params, hub, origins


def _part_of(loaded: model_folder.LoadedModel, part: str) -> Any:
    if part == "vae":
        return loaded.vae
    params = loaded.params or {}
    if part == "repa_target" and part not in params and loaded.cfg.und_encoder == "siglip":
        return params.get("und_encoder")
    return params.get(part)


def _other_config(ours: ModelConfig, theirs: ModelConfig, part: str, path: str) -> list[str]:
    """The fields that no shape shows, in which a part was another model's: with ours it would
    compute something else. Sizes of pictures may differ."""
    out = []
    for section in _sections(ours, part):
        here, there = (config_lib.to_dict(getattr(m, section)) for m in (ours, theirs))
        for name in here.keys() - {"image_size"}:
            if here[name] != there[name]:
                field = f"model.{section}.{name}"
                flag = shlex.quote(f"--config.{field}={there[name]!r}")
                out.append(
                    f"{path}: its {part} was made with {field} = {there[name]!r}; got "
                    f"{here[name]!r}: give {flag}"
                )
    return sorted(out)


def _sections(model: ModelConfig, part: str) -> tuple[str, ...]:
    """The sections of a model's config that say how a part computes."""
    if part == "und_encoder" and model.und_encoder != "siglip":
        return ("gen", "vae")
    known = {"llm": ("llm",), "und_encoder": ("und",), "repa_target": ("und",), "vae": ("vae",)}
    return known.get(part, ("gen",) if part in ("gen_encoder", "gen_decoder") else ())


def _unmatched(cfg: TrainConfig, params: Any) -> list[str]:
    """The paths to train that the model does not have."""
    names = trees.flatten(params)
    return [
        f"train_parts: {path!r} is no path of this model's parameters, such as {next(iter(names))}"
        for path in cfg.train_parts
        if path.split("/")[0] in cfg.model.parts
        and not any(trees.below(name, path) for name in names)
    ]


def _host(tree: Any) -> Any:
    """float32 on the host: arrays of one device cannot enter a step on a mesh of several."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def check_needs(cfg: TrainConfig) -> None:
    """Raises ConfigError that lists the models, data sets and tokenizers that are missing on disk.

    Loads nothing: a run of hours must not learn in its tenth minute that data is missing.
    """
    problems = []
    starts = dict.fromkeys([cfg.start, *(p for _, p in cfg.init if p != "fresh")])
    for path in filter(None, starts):
        if not model_folder.is_model(path):
            problems.append(f"{path}: expected a model folder or a training run; found none")
    for s in (*cfg.data.sources, *cfg.heldout, *cfg.evaluate.sources):
        try:
            sources.mapped(sources.open_source(s.path, s.split), s.fields, s.task)
        except DataError as error:
            problems.append(str(error))
    if cfg.tokenizer and not epath.Path(cfg.tokenizer).exists():
        problems.append(f"{cfg.tokenizer}: expected a tokenizer folder; found none")
    if problems:
        listed = "\n".join(f"  - {p}" for p in dict.fromkeys(problems))
        raise ConfigError(
            f"config {cfg.name!r} needs what is not here:\n{listed}\ntools/prepare_data.py "
            "(--heldout SHARE adds a held-out split) and tools/prepare_openmoji.py create data "
            "sets, tools/convert_checkpoint.py creates models (docs/data.md, docs/training.md)"
        )


def print_origins(cfg: TrainConfig, params: Any, vae_params: Any, origins: dict[str, str]) -> None:
    """A line a part: parameters, how many of them this run trains, where they come from."""
    if not processes.is_main():
        return
    trained, _ = trees.split(params, parts_lib.trained_paths(cfg))
    print(f"{'part':12} {'parameters':>14} {'trained':>14}  origin")
    for part, tree in [*params.items(), ("vae", vae_params)]:
        count = optim.count_params(trained.get(part, {}))
        size = f"{count:,}" if count else "frozen"
        print(f"{part:12} {optim.count_params(tree):>14,} {size:>14}  {origins[part]}")
    if cfg.lora.rank:
        adapted = jax.eval_shape(
            lambda t, k: lora.add(t, cfg.lora, k), params["llm"], jax.random.key(0)
        )
        moved, _ = trees.split({"llm": adapted}, parts_lib.lora_paths(cfg.lora))
        count = optim.count_params(moved)
        what = f"adapters of rank {cfg.lora.rank} on {', '.join(cfg.lora.targets)}"
        print(f"{'lora':12} {count:>14,} {count:>14,}  {what}")
