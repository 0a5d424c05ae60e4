"""Autoencoders of diffusers' folders: the goldens of tests/data/vaes, and others of their forms."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helpers import golden
from janusflow_jax.config import VaeConfig
from janusflow_jax.hub import configs, names, source, tensors
from janusflow_jax.models import vae

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "vaes"


def read(folder: Any) -> tuple[VaeConfig, Any]:
    """The config and the parameters of a folder."""
    opened = source.open_vae(folder)
    batch_norm = source.pop_batch_norm(opened)
    cfg = configs.vae_config_from_hf(opened.json("config.json"), batch_norm)
    rules, shapes = names.vae_rules(cfg), tensors.vae_shapes(cfg)
    tensors.check(opened.tensors, rules, shapes, opened.folder)
    return cfg, tensors.from_torch(opened.tensors, rules, shapes)


@functools.partial(jax.jit, static_argnums=0)
def compute(cfg: VaeConfig, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """What `make_vaes.compute` gives, in NHWC."""
    module = vae.Vae(cfg)
    mean, logvar = module.apply({"params": params}, images, method="encode")
    scaled = vae.scale(cfg, mean)
    decoded = module.apply({"params": params}, vae.unscale(cfg, scaled), method="decode")
    return {"mean": mean, "logvar": logvar, "scaled": scaled, "decoded": decoded}


def errors(folder: Any, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """max |a - b| / max |b| of each value."""
    cfg, params = read(folder)
    params = jax.tree.map(jnp.asarray, params)
    got = compute(cfg, params, jnp.asarray(golden.nhwc(expected["images"])))
    return {name: golden.error(x, golden.nhwc(expected[name])) for name, x in got.items()}
