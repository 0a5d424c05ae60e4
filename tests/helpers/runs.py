"""Tiny training runs: a config of seconds, its records, and what a run leaves on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from helpers.records import HUB
from janusflow_jax import config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import trees
from janusflow_jax.training import step as train_step
from tools import crash_test

ROOT = Path(__file__).parents[2]
record = crash_test.record


def config(workdir: Any, **fields) -> c.TrainConfig:
    """The test twin of configs/emoji.py: 4 steps of 8 rows. It needs the fixture `store`."""
    cfg = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]("test")
    cfg.tokenizer, cfg.workdir = str(HUB), str(workdir)
    cfg.prompts, cfg.heldout = (), ()  # the sheet takes longer than the steps
    for name, value in fields.items():
        setattr(cfg, name, value)
    return cfg


def tiny_config(workdir: Any, **fields) -> c.TrainConfig:
    """The same with 60,000 parameters and two steps: for tests that run every time."""
    cfg = config(workdir)
    cfg.model = crash_test.tiny_config("", "").model
    cfg.optim = dataclasses.replace(cfg.optim, lr=1e-3, warmup_steps=1, ema=0.9)
    cfg.num_steps = 2
    cfg.log_every_steps, cfg.save_every_steps = 1, 0
    cfg.remat = "none"
    for name, value in fields.items():
        setattr(cfg, name, value)
    return cfg


def save_start(path: str, seed: int = 0, model: Any = None, **fields) -> str:
    """A whole model at a path, of the tiny size if not given, with other values of some fields."""
    model = model or tiny_config("x").model
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(model, section), field, value)
    shapes = janusflow.param_shapes(model), vae.param_shapes(model.vae)
    values = np.random.default_rng(seed)
    params, vae_params = jax.tree.map(
        lambda x: (0.02 * values.standard_normal(x.shape)).astype(np.float32), shapes
    )
    model_folder.save_model(
        path,
        model_cfg=model,
        params=params,
        vae=vae_params,
        hub_files=epath.Path(HUB),
        extra={},
        overwrite=True,
    )
    return path


def share_compiled_step(monkeypatch: Any) -> None:
    """All runs of a test use the step that the first one compiles; their configs must be alike."""
    compiled, jit = [], train_step.jit_train_step

    def jit_once(*args: Any) -> Any:
        compiled[:] = compiled or [jit(*args)]
        return compiled[0]

    monkeypatch.setattr(train_step, "jit_train_step", jit_once)


@functools.partial(jax.jit, static_argnums=0)
def fresh_params(model: c.ModelConfig, key: jax.Array) -> tuple:
    """Random parameters of the model and of its VAE."""
    return janusflow.init_params(model, key), vae.init_params(model.vae, key)


def last_arrays(workdir: Any) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by its path."""
    step = model_folder.committed_steps(workdir)[-1]
    folder = Path(workdir) / "checkpoints" / str(step)
    saved = {n: model_folder.load_tree(folder / n) for n in ("params", "ema", "opt_state")}
    return trees.flatten(jax.device_get(saved))


def read_metrics(workdir: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(x) for x in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
