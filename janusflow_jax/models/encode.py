"""Images as inputs of the model: pixels in [-1, 1], VAE latents, and encoders over image slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from janusflow_jax.config import ModelConfig
from janusflow_jax.models import vae
from janusflow_jax.parallel import sharding

IMAGES_AT_ONCE = 16
PIXELS_AT_ONCE = 256 * 256
"""For an understanding encoder with a VAE, whose activations are large. Small images share a pass:
XLA's gradient of a convolution inside a loop takes 16 times as long on CPU."""


def to_float(images: Any, dtype: Any) -> Array:
    """uint8 -> [-1, 1]."""
    return (jnp.asarray(images, jnp.float32) / 127.5 - 1.0).astype(dtype)


def over_slots(fn: Any, x: Shaped[Array, "B K ..."], at_once: int = 1) -> Any:
    """Applies an image encoder to `at_once` slots of every row at a time (`lax.map`).

    That takes less memory, and rows stay on their devices.
    """
    rows, slots = x.shape[:2]
    x = jnp.moveaxis(x.reshape(rows, slots // at_once, at_once, *x.shape[2:]), 1, 0)
    x = x.reshape(-1, rows * at_once, *x.shape[3:])
    out = lax.map(fn, x) if len(x) > 1 else jax.tree.map(lambda y: y[None], fn(x[0]))

    def unfold(y: Array) -> Array:
        y = y.reshape(slots // at_once, rows, at_once, *y.shape[2:])
        return jnp.moveaxis(y, 0, 1).reshape(rows, slots, *y.shape[3:])

    return jax.tree.map(unfold, out)


def slots_at_once(rows: int, slots: int, images: int = IMAGES_AT_ONCE) -> int:
    """The number of slots in a pass of an encoder: a device gets at most `images` images.

    On a mesh the parameters of SigLIP are gathered for every pass. With one slot a pass that is
    most of the traffic of pre-training.
    """
    local_rows = max(rows // sharding.batch_size(), 1)
    fits = (n for n in range(2, slots + 1) if slots % n == 0 and n * local_rows <= images)
    return max(fits, default=1)


@jax.named_scope("vae")
def encode_latents(
    vae_params: Any, images: Array, posterior: Array | None, cfg: ModelConfig, dtype: Any
) -> Float[Array, "B K h w C"]:
    """Scaled latents of uint8[B, K, H, W, 3]: the posterior's mean plus std times `posterior`."""
    module = vae.Vae(cfg.vae, dtype)

    def encode(pixels: Array) -> tuple[Array, Array]:
        return module.apply({"params": vae_params}, to_float(pixels, dtype), method="encode")

    mean, logvar = over_slots(encode, images)
    return scaled_latents(mean, logvar, posterior, cfg)


def scaled_latents(
    mean: Float[Array, "*b h w C"],
    logvar: Float[Array, "*b h w C"],
    posterior: Array | None,
    cfg: ModelConfig,
) -> Float[Array, "*b h w C"]:
    """Scaled latents, float32 and without gradient, of a posterior from the VAE or a cache."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    if posterior is not None:
        mean = mean + jnp.exp(0.5 * logvar) * posterior
    return lax.stop_gradient(vae.scale(cfg.vae, mean))


def understanding_input(
    vae_params: Any, images: Array, cfg: ModelConfig, dtype: Any
) -> Float[Array, "B ..."]:
    """The input of `JanusFlow.understanding_slot` for images uint8[B, H, W, 3]."""
    if cfg.und_encoder != "shared":
        return to_float(images, dtype)
    return encode_latents(vae_params, images[:, None], None, cfg, dtype)[:, 0]
