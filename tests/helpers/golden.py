"""The golden numbers: a tiny model as it comes from the Hub, and what it must compute.

Made by the published PyTorch code on random weights (CPU, float32). Arrays there are NCHW.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from helpers import torch_trees
from janusflow_jax import config
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.models import janusflow

ROOT = pathlib.Path(__file__).parents[1] / "data" / "golden"
TINY = ROOT / "tiny"
PART = 2e-6  # max |a - b| / max |b| of one part
GRAD = 1e-5


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """'expected', 'train', or a file below tiny/ without its ending."""
    return load_file(TINY / f"{name}.safetensors")


@functools.cache
def facts(name: str) -> dict[str, Any]:
    """'expected' or 'train', the JSON beside the arrays."""
    return json.loads((TINY / f"{name}.json").read_text())


@functools.cache
def model() -> tuple[janusflow.JanusFlow, dict[str, Any], dict[str, Any]]:
    """The tiny model, its parameters with the REPA head, and the VAE's."""
    cfg = config.model_config("test")
    params = torch_trees.janusflow_from_torch(arrays("janusflow/model"), cfg)
    head = {n: x for n, x in arrays("train").items() if n.startswith("repa_head.")}
    params["repa_head"] = torch_trees.repa_from_torch(head, cfg)
    vae = torch_trees.vae_from_torch(arrays("vae/diffusion_pytorch_model"), cfg.vae)
    with jax.ensure_compile_time_eval():  # the first caller may be inside a trace
        params, vae = jax.tree.map(jnp.asarray, (params, vae))
    return janusflow.JanusFlow(cfg), params, vae


def token_ids(chat: Any, text: str) -> list[int]:
    """BOS and the ids of a text, in which special strings are tokens."""
    return [chat.bos_id, *chat.tokenizer.encode(text, add_special_tokens=False).ids]


def save(folder: Any, hub: Any) -> Any:
    """The tiny model as a model folder; `hub` as `checkpoint.save_model` takes it."""
    tiny, params, vae = model()
    model_folder.save_model(
        folder, model_cfg=tiny.cfg, params=params, vae=vae, hub_files=hub, extra={}
    )
    return folder


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def error(got: Any, want: np.ndarray) -> float:
    """max |got - want| / max |want|."""
    got = np.asarray(got)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())
