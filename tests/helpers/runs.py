"""Tiny training runs: a config of seconds, its records, and what a run leaves on disk."""

from __future__ import annotations

import functools
import io
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from helpers.records import HUB
from janusflow_jax import config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import trees

ROOT = Path(__file__).parents[2]
COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 180, 40)}


def record(i: int) -> dict[str, Any]:
    """A colored rectangle and its caption."""
    color = list(COLORS)[i % 3]
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[8 : 40 + i % 8, 16:48] = COLORS[color]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return {"id": str(i), "image": data.getvalue(), "captions": [f"a {color} fox"]}


def config(workdir: Any, **fields) -> c.TrainConfig:
    """The test twin of configs/emoji.py: 4 steps of 8 rows. It needs the fixture `store`."""
    cfg = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]("test")
    cfg.tokenizer, cfg.workdir = str(HUB), str(workdir)
    cfg.prompts, cfg.heldout = (), ()  # the sheet takes longer than the steps
    for name, value in fields.items():
        setattr(cfg, name, value)
    return cfg


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
