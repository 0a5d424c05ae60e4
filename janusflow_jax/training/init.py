"""Initializes a run: which folder or fresh values every part starts from, and the sharded state
made of them or restored from the newest checkpoint.

Whole parameter trees stay on the host as NumPy arrays; a device only ever holds its shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import model_folder, run as run_checkpoints
from janusflow_jax.config import ModelConfig, TrainConfig, parts as parts_lib
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.config.fields import differences
from janusflow_jax.data import sources
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import numerics, processes, sharding, trees
from janusflow_jax.training import optim, step as train_step

Tree = dict[str, Any]
SECTIONS = {
    "llm": ("llm",),
    "und_encoder": ("und",),
    "repa_target": ("und",),
    "gen_encoder": ("gen",),
    "gen_decoder": ("gen",),
    "vae": ("vae",),
}
"""Part -> the sections of a model's config that say how it computes."""


def resolve_start(cfg: TrainConfig, workdir: epath.Path) -> tuple[TrainConfig, bool]:
    """The config with `start`, `init` and `tokenizer` as a run in this folder reads them, and
    whether it resumes from a checkpoint.

    A run keeps the VAE and the tokenizer of its `base/`, whatever `start` holds by now. Once it has
    a checkpoint, that has the other parts, and `start` may be gone.
    """
    base = workdir / "base"
    if not model_folder.is_model(base):
        return cfg, False
    resumed = bool(model_folder.committed_steps(workdir))
    fields: dict[str, Any] = {"init": (), "start": str(base), "tokenizer": str(base / "hub")}
    if not (resumed or cfg.lora.rank):
        others = tuple((part, path) for part, path in cfg.init if part != "vae")
        fields |= {"init": (*others, ("vae", str(base))), "start": cfg.start}
    return dataclasses.replace(cfg, **fields, allow_fresh=cfg.allow_fresh or resumed), resumed


def initial_params(
    cfg: TrainConfig, resumed: bool = False
) -> tuple[Tree, Tree, str, dict[str, str]]:
    """Every part, from where `init` or `start` says: float32 on the host.

    Args: resumed: a checkpoint will supply what no folder has: ShapeDtypeStructs stand for it.
    Returns: params, VAE params, the folder of tokenizer files, part -> origin ('fresh' or a path).
    Raises:
      ConfigError: a pretrained part would be fresh, a path lacks a part or has it of another
        config, or a path of `train_parts` does not exist in the model.
    """
    folders: dict[str, model_folder.LoadedModel] = {}
    origins = dict.fromkeys([*cfg.model.parts, "vae"], "fresh")
    if cfg.start:
        start = folders[cfg.start] = model_folder.load_model(cfg.start)
        origins |= {p: cfg.start for p in origins if _part_of(start, p) is not None}
        del start  # so that the loop below frees it
    origins |= dict(cfg.init)
    _check_pretrained(cfg, origins)
    params = {**janusflow.param_shapes(cfg.model), "vae": vae.param_shapes(cfg.model.vae)}
    problems, hub = _unknown_paths(cfg, params), cfg.tokenizer
    with _on_host():
        key = numerics.key(cfg.seed)
        fresh = tuple(p for p in cfg.model.parts if origins[p] == "fresh" and not resumed)
        if fresh:
            params |= _to_host(_fresh_parts(cfg.model, fresh, key))
        if origins["vae"] == "fresh":
            params["vae"] = _to_host(jax.jit(vae.init_params, static_argnums=0)(cfg.model.vae, key))
    for path in dict.fromkeys(origins.values()):
        if path == "fresh":
            continue
        loaded = folders.pop(path, None) or model_folder.load_model(path)
        parts = [p for p, origin in origins.items() if origin == path]
        for part in parts:
            tree = _part_of(loaded, part)
            if tree is None:
                problems.append(f"{path} has no part {part!r}; it has {loaded.parts}")
                continue
            problems += trees.mismatches(params[part], tree, part) or (
                _other_config(cfg.model, loaded.cfg, part, path)
            )
            params[part] = _to_host(tree)
        if not hub and "llm" in parts:
            hub = str(loaded.hub)
    config_lib.raise_problems("init", problems)
    if not hub:
        raise ConfigError(
            "tokenizer: expected a folder with tokenizer.json and processor_config.json (a "
            "model folder's hub/); got '' and no `init` of the llm to take it from"
        )
    vae_params = params.pop("vae")
    if cfg.model.und_encoder == "own" and "und_encoder" in fresh:
        encoder = {name: vae_params[name] for name in params["und_encoder"]["vae"]}
        params["und_encoder"] |= {"vae": jax.tree.map(np.copy, encoder)}
        origins["und_encoder"] = "the VAE's encoder, and fresh blocks"
    return params, vae_params, hub, origins


def _check_pretrained(cfg: TrainConfig, origins: dict[str, str]) -> None:
    """Raises ConfigError where a part that needs pretrained weights would be fresh."""
    fresh = [p for p in parts_lib.PRETRAINED_PARTS if origins.get(p) == "fresh"]
    if cfg.model.und_encoder == "own" and "und_encoder" in fresh:
        fresh.remove("und_encoder")  # it starts as a copy of the VAE's encoder
    if fresh and not cfg.allow_fresh:
        raise ConfigError(
            f"init: the parts {fresh} would start from random values, which training could not "
            "make up for; expected a path for each (--config.init) or for all (--config.start), "
            "made by experiments/starts/train_vae.py, experiments/starts/pretrain_tiny.py or "
            "tools/convert_checkpoint.py"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh_parts(model: ModelConfig, parts: tuple[str, ...], key: jax.Array) -> Tree:
    """These parts with random values; a part's values do not depend on the others."""
    params = janusflow.init_params(model, key)
    return {p: params[p] for p in parts}


def _on_host() -> contextlib.AbstractContextManager:
    """Makes the CPU the default device: the first accelerator may not have room for a model."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return contextlib.nullcontext()


def _to_host(tree: Any) -> Any:
    """float32 NumPy arrays: those of one device cannot enter a step on a mesh of several."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def _part_of(loaded: model_folder.LoadedModel, part: str) -> Any:
    """A part of a model, or None. Any SigLIP can be the `repa_target`."""
    if part == "vae":
        return loaded.vae
    params = loaded.params or {}
    if part == "repa_target" and part not in params and loaded.cfg.und_encoder == "siglip":
        part = "und_encoder"
    return params.get(part)


def _other_config(ours: ModelConfig, theirs: ModelConfig, part: str, path: str) -> list[str]:
    """Differences in fields that no shape shows, with which the part would compute something else.
    Image sizes may differ."""
    sections = SECTIONS.get(part, ())
    if part == "und_encoder" and ours.und_encoder != "siglip":
        sections = ("gen", "vae")
    out = []
    for section in sections:
        then, now = (config_lib.to_dict(getattr(model, section)) for model in (theirs, ours))
        where = f"model.{section}."
        for difference in differences(then, now, (f"{where}image_size",), where):
            out.append(
                f"{path}: its {part} was made with other values ({difference}): set the first one "
                "with --config.FIELD=VALUE"
            )
    return out


def _unknown_paths(cfg: TrainConfig, params: Any) -> list[str]:
    """The paths to train that the model does not have."""
    names = trees.flatten(params)
    return [
        f"train_parts: {path!r} is no path of this model's parameters, such as {next(iter(names))}"
        for path in cfg.train_parts
        if parts_lib.top(path) in cfg.model.parts
        and not any(trees.below(name, path) for name in names)
    ]


def check_files(cfg: TrainConfig) -> None:
    """Checks that every model, data set and tokenizer exists, before anything is loaded.

    Raises:
      ConfigError: lists what is missing.
    """
    problems = []
    for path in [cfg.start, *(p for _, p in cfg.init if p != "fresh")]:
        if path and not model_folder.is_model(path):
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
            f"config {cfg.name!r} needs files that are missing:\n{listed}\n"
            "tools/prepare_data.py (--heldout SHARE adds a held-out split) and "
            "tools/prepare_openmoji.py make data sets, tools/convert_checkpoint.py makes models "
            "(docs/data.md, docs/training.md)"
        )


def print_origins(cfg: TrainConfig, params: Any, vae_params: Any, origins: dict[str, str]) -> None:
    """Prints for every part how many parameters it has, how many are trained, and its origin."""
    if not processes.is_main():
        return
    state = jax.eval_shape(functools.partial(train_step.create_state, cfg), params, vae_params)
    whole = {**trees.merge(state["frozen"], state["params"]), "vae": vae_params}
    print(f"{'part':12} {'parameters':>14} {'trained':>14}  origin")
    for part, origin in origins.items():
        trained = optim.count_params(state["params"].get(part, {}))
        size = f"{trained:,}" if trained else "frozen"
        print(f"{part:12} {optim.count_params(whole[part]):>14,} {size:>14}  {origin}")


# The state of a run


def create_state(cfg: TrainConfig, mesh: Mesh, params: Tree, vae_params: Tree) -> train_step.State:
    """The sharded state of a new run, from whole trees that every process has."""
    train, frozen = trees.split(params, parts_lib.trained_paths(cfg))
    # Cast on the host: a device may not have room for both.
    params = trees.merge(train, _cast(frozen, cfg.frozen_dtype))
    vae_params = _cast(vae_params, cfg.frozen_dtype)
    create = functools.partial(train_step.create_state, cfg)
    where = train_step.state_shardings(jax.eval_shape(create, params, vae_params), mesh)
    whole = (params, vae_params)
    sharded = sharding.put_tree(whole, sharding.tree_shardings(whole, mesh))
    return jax.jit(create, out_shardings=where)(*sharded)


def restore_state(
    cfg: TrainConfig,
    mesh: Mesh,
    params: Tree,
    vae_params: Tree,
    checkpoints: run_checkpoints.RunCheckpoints,
) -> tuple[train_step.State, dict[str, Any]] | None:
    """The state of the newest intact checkpoint, and its `run.json`; None where there is none.

    Args: params: shapes suffice for what the checkpoint holds.
    """
    create = functools.partial(train_step.create_state, cfg)
    shapes = jax.eval_shape(create, params, vae_params)
    where = train_step.state_shardings(shapes, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    saved = {**state, "params": params_to_save(cfg, state)}
    restored = checkpoints.restore_newest({n: saved[n] for n in train_step.SAVED})
    if restored is None:
        return None
    arrays, run = restored
    train, frozen = trees.split(arrays["params"], trees.flatten(state["params"]))
    held, of_base = trees.flatten(frozen), trees.flatten(params)
    rest = {n: of_base[n] for n in trees.flatten(state["frozen"]) if n not in held}
    other = {
        "frozen": _cast(trees.unflatten(rest), cfg.frozen_dtype),
        "vae": _cast(vae_params, cfg.frozen_dtype),
        "step": np.int32(run["step"]),
        "bad_steps": np.int32(run["bad_steps"]),
    }
    other = sharding.put_tree(other, sharding.tree_shardings(other, mesh))
    other["frozen"] = trees.merge(other["frozen"], frozen)
    return {**arrays, **other, "params": train}, run


def params_to_save(cfg: TrainConfig, state: train_step.State) -> Tree:
    """The parameters that a checkpoint holds: all; in a LoRA run, whose `base/` has the frozen
    ones, only the trained ones and the scales of adapters."""
    frozen = state["frozen"]
    if cfg.lora.rank:
        leaves = trees.flatten(frozen)
        frozen = trees.unflatten({n: x for n, x in leaves.items() if parts_lib.is_lora_path(n)})
    return trees.merge(frozen, state["params"])


def base_params(cfg: TrainConfig, params: Tree) -> Tree | None:
    """The parameters that `base/` holds so that checkpoints need not repeat them: all in a LoRA
    run, in the run's dtypes; None in other runs."""
    if not cfg.lora.rank:
        return None
    train, frozen = trees.split(params, parts_lib.trained_paths(cfg))
    return trees.merge(_cast(frozen, cfg.frozen_dtype), train)


def _cast(tree: Tree, dtype: str) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False), tree)
