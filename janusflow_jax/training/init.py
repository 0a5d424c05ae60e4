"""Initializes a run: which folder or fresh values every part starts from, and the sharded state
made of them or restored from the newest checkpoint.

Parameters are made or read in their shards: no device and no host holds a whole model. Only the
VAE, which every device has whole, is read by the hosts.
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
from jax.sharding import Mesh, NamedSharding

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import model_folder, run as run_checkpoints
from janusflow_jax.config import ModelConfig, TrainConfig, files, parts as parts_lib
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.config.fields import differences
from janusflow_jax.data import cache, sources
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
    if not (resumed or cfg.lora.rank or cfg.distills):
        others = tuple((part, path) for part, path in cfg.init if part != "vae")
        fields |= {"init": (*others, ("vae", str(base))), "start": cfg.start}
    return dataclasses.replace(cfg, **fields, allow_fresh=cfg.allow_fresh or resumed), resumed


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from. Of its values only the VAE's have been read."""

    params: Tree  # ShapeDtypeStructs
    vae: Tree  # float32 numpy arrays
    hub: str  # folder of tokenizer files
    origins: dict[str, str]  # part -> 'fresh', a path, or another description
    files: dict[str, model_folder.ModelFiles]  # part -> the model that has it

    def read(self, like: Tree) -> Tree:
        """Reads arrays of parts that are not fresh; `like` as in `ModelFiles.read`."""
        out = {}
        for part, targets in like.items():
            stored = _stored_as(self.files[part], part)
            out[part] = self.files[part].read({stored: targets})[stored]
        return out

    def whole(self, part: str) -> Tree:
        """A part in float32 on the host; {} if it is fresh."""
        if part not in self.files:
            return {}
        return self.read({part: _host_arrays(self.params[part])})[part]


def find_start(cfg: TrainConfig, resumed: bool = False) -> Start:
    """Where every part comes from, as `init` or `start` says.

    Args: resumed: a checkpoint will supply what no folder has.
    Raises:
      ConfigError: a pretrained part would be fresh, a path lacks a part or has it of another
        config, or a path of `train_parts` does not exist in the model.
    """
    origins = dict.fromkeys([*cfg.model.parts, "vae"], "fresh")
    opened: dict[str, model_folder.ModelFiles] = {}
    if cfg.start:
        start = opened[cfg.start] = model_folder.open_model(cfg.start)
        origins |= {p: cfg.start for p in origins if _stored_as(start, p) in start.shapes}
    origins |= dict(cfg.init)
    _check_pretrained(cfg, origins)
    shapes = {**janusflow.param_shapes(cfg.model), "vae": vae.param_shapes(cfg.model.vae)}
    problems, hub, files = _unknown_paths(cfg, shapes), cfg.tokenizer, {}
    for part, path in origins.items():
        if path == "fresh":
            continue
        model = opened[path] = opened.get(path) or model_folder.open_model(path)
        stored = model.shapes.get(_stored_as(model, part))
        if stored is None:
            problems.append(f"{path} has no part {part!r}; it has {sorted(model.shapes)}")
            continue
        if misfits := trees.mismatches(shapes[part], stored, part):
            problems += [_other_start(cfg.model, model.cfg, path)] if path == cfg.start else misfits
        else:
            problems += _other_config(cfg, model.cfg, part, path)
        files[part] = model
        if not hub and part == "llm":
            hub = str(model.hub)
    config_lib.raise_problems("init", list(dict.fromkeys(problems)))
    if not hub:
        raise ConfigError(
            "tokenizer: expected a folder with tokenizer.json and processor_config.json (a "
            "model folder's hub/); got '' and no `init` of the llm to take it from"
        )
    vae_shapes = shapes.pop("vae")
    if "vae" in files:
        vae_params = files["vae"].read({"vae": _host_arrays(vae_shapes)})["vae"]
    else:
        vae_params = _fresh_vae(cfg)
    if cfg.model.und_encoder == "own" and origins["und_encoder"] == "fresh" and not resumed:
        origins["und_encoder"] = "the VAE's encoder, and fresh blocks"
    return Start(shapes, vae_params, hub, origins, files)


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


def _host_arrays(shapes: Tree) -> Tree:
    return jax.tree.map(lambda x: np.empty(x.shape, np.float32), shapes)


def _fresh_vae(cfg: TrainConfig) -> Tree:
    """A VAE with random values, on the host."""
    try:
        host = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        host = contextlib.nullcontext()
    with host:
        key = numerics.key(cfg.seed)
        return jax.device_get(jax.jit(vae.init_params, static_argnums=0)(cfg.model.vae, key))


def _stored_as(model: model_folder.ModelFiles, part: str) -> str:
    """The part of a model that a part is read from. Any SigLIP can be the `repa_target`."""
    if part == "repa_target" and part not in model.shapes and model.cfg.und_encoder == "siglip":
        return "und_encoder"
    return part


def _other_start(ours: ModelConfig, theirs: ModelConfig, path: str) -> str:
    """Where the start's model differs from the run's."""
    then, now = (config_lib.to_dict(model) for model in (theirs, ours))
    lines = differences(then, now, ("model.name",), "model.")
    more = f"; {len(lines) - 4} more" if len(lines) > 4 else ""
    return (
        f"{path}: expected the run's model; got another ({'; '.join(lines[:4])}{more}): take the "
        "start's model by own in the argument of --config (configs/pretrain.py:own)"
    )


def _other_config(cfg: TrainConfig, theirs: ModelConfig, part: str, path: str) -> list[str]:
    """Differences in fields that no shape shows, with which the part would compute something else.
    Image sizes may differ."""
    ours, sections = cfg.model, SECTIONS.get(part, ())
    if part == "gen_decoder" and cfg.distills and theirs.student.steps:
        return [
            f"{path}: expected a teacher; got a student of {theirs.student.steps} steps, whose "
            "images no flow loss and no guidance can train: take the model that it was distilled "
            "from"
        ]
    if part == "gen_decoder" and not cfg.distills:
        sections = (*sections, "student")
    if part == "und_encoder" and ours.und_encoder != "siglip":
        sections = ("gen", "vae")
    out = []
    for section in sections:
        then, now = (config_lib.to_dict(getattr(model, section)) for model in (theirs, ours))
        where = f"model.{section}."
        for difference in differences(then, now, (f"{where}image_size",), where):
            out.append(
                f"{path}: its {part} was made with other values ({difference}): take the start's "
                "model by own in the argument of --config, or set the first one with "
                "--config.FIELD=VALUE"
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
    """Checks that every model, data set, cache and tokenizer exists, before anything is loaded.

    Raises:
      ConfigError: lists what is missing.
    """
    problems = []
    for path in [cfg.start, *(p for _, p in cfg.init if p != "fresh")]:
        if path and not model_folder.is_model(path):
            problems.append(f"{path}: expected a model folder or a training run; found none")
    for s in (*cfg.data.sources, *cfg.heldout, *cfg.evaluate.sources):
        try:
            data = sources.mapped(sources.open_source(s.path, s.split), s.fields, s.task)
            if s in cfg.heldout and len(data) and not {"image", "captions"} <= set(data[0]):
                problems.append(
                    f"heldout: {s.path}: expected records of an image and captions, to be "
                    f"captioned; got {', '.join(data[0])}: measure its loss (evaluate.sources)"
                )
        except DataError as error:
            problems.append(str(error))
    for path in filter(None, (s.cache for s in cfg.data.sources)):
        try:
            cache.read_manifest(path)
        except DataError as error:
            problems.append(str(error))
    if cfg.tokenizer and not files.resolve(cfg.tokenizer).exists():
        problems.append(f"{cfg.tokenizer}: expected a tokenizer folder; found none")
    if problems:
        listed = "\n".join(f"  - {p}" for p in dict.fromkeys(problems))
        raise ConfigError(
            f"config {cfg.name!r} needs files that are missing:\n{listed}\n"
            "tools/prepare_data.py (--heldout SHARE adds a held-out split) and "
            "tools/prepare_openmoji.py make data sets, tools/convert_checkpoint.py makes models, "
            "tools/cache_latents.py makes caches, without which the paper's stages run as "
            "configs/pretrain.py:online (docs/data.md, docs/training.md)"
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


def initial_params(cfg: TrainConfig, mesh: Mesh, start: Start) -> Tree:
    """The parameters of a new run in their shards and types: read, or made from `cfg.seed`."""
    trained = trees.flatten(trees.split(start.params, parts_lib.trained_paths(cfg))[0])
    like = trees.unflatten(
        {
            name: jax.ShapeDtypeStruct(
                x.shape,
                "float32" if name in trained else cfg.frozen_dtype,
                sharding=NamedSharding(mesh, sharding.param_spec(name, x.shape, mesh)),
            )
            for name, x in trees.flatten(start.params).items()
        }
    )
    fresh = {part: tree for part, tree in like.items() if part not in start.files}
    params = start.read({part: tree for part, tree in like.items() if part in start.files})
    params |= fresh_params(cfg, fresh)
    if cfg.model.und_encoder == "own" and "und_encoder" in fresh:
        own = like["und_encoder"]["vae"]
        copy = jax.tree.map(
            lambda x, y: np.asarray(x, y.dtype), {n: start.vae[n] for n in own}, own
        )
        own = sharding.put_tree(copy, jax.tree.map(lambda x: x.sharding, own))
        params["und_encoder"] = {**params["und_encoder"], "vae": own}
    return params


def fresh_params(cfg: TrainConfig, like: Tree) -> Tree:
    """Random values of some parts in the types and shardings of `like`. A part's values do not
    depend on which others are made."""
    if not like:
        return {}

    def init(key: jax.Array) -> Tree:
        params = janusflow.init_params(cfg.model, key)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), {p: params[p] for p in like}, like)

    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(init, out_shardings=where)(numerics.key(cfg.seed))


def create_state(cfg: TrainConfig, mesh: Mesh, params: Tree, vae_params: Tree) -> train_step.State:
    """The sharded state of a new run.

    Args: params: of `initial_params`, whose buffers it donates; or whole, on every host.
    """
    vae_params = _cast(vae_params, cfg.frozen_dtype)
    create = functools.partial(train_step.create_state, cfg)
    where = train_step.state_shardings(jax.eval_shape(create, params, vae_params), mesh)
    whole = (params, vae_params)
    sharded = sharding.put_tree(whole, sharding.tree_shardings(whole, mesh))
    return jax.jit(create, out_shardings=where, donate_argnums=(0, 1))(*sharded)


def restore_state(
    cfg: TrainConfig, mesh: Mesh, start: Start, checkpoints: run_checkpoints.RunCheckpoints
) -> tuple[train_step.State, dict[str, Any]] | None:
    """The state of the newest intact checkpoint, and its `run.json`; None where there is none.

    Reads only what the checkpoint does not hold from the start.
    """
    create = functools.partial(train_step.create_state, cfg)
    shapes = jax.eval_shape(create, start.params, start.vae)
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
    held = trees.flatten(frozen)
    rest = {n: x for n, x in trees.flatten(state["frozen"]).items() if n not in held}
    frozen = trees.merge(start.read(trees.unflatten(rest)), frozen)
    other = {
        "vae": _cast(start.vae, cfg.frozen_dtype),
        "step": np.int32(run["step"]),
        "bad_steps": np.int32(run["bad_steps"]),
        "mean_norm": np.float32(run.get("mean_norm", 0)),  # older runs have none
    }
    other = sharding.put_tree(other, sharding.tree_shardings(other, mesh))
    if cfg.distills:
        other["teacher"] = start.read(state["teacher"])
    return {**arrays, **other, "params": train, "frozen": frozen}, run


def params_to_save(cfg: TrainConfig, state: train_step.State) -> Tree:
    """The parameters that a checkpoint holds: all; in a LoRA run, whose `base/` has the frozen
    ones, only the trained ones and the scales of adapters."""
    frozen = state["frozen"]
    if cfg.lora.rank:
        leaves = trees.flatten(frozen)
        frozen = trees.unflatten({n: x for n, x in leaves.items() if parts_lib.is_lora_path(n)})
    return trees.merge(frozen, state["params"])


def _cast(tree: Tree, dtype: str) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False), tree)
