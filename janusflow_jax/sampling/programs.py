"""The programs that `Pipeline` runs, as jitted functions. Buffers that are used up are donated.

Static arguments come first. The planner and the benchmarks compile the same functions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from janusflow_jax.config import ModelConfig
from janusflow_jax.models import encode, janusflow, vae
from janusflow_jax.parallel import numerics
from janusflow_jax.sampling import image, text

IMAGES_AT_ONCE = 16

sample = jax.jit(
    image.sample,
    static_argnums=0,
    static_argnames=("sampler", "head"),
    donate_argnames="noise",
)
"""`image.sample`, which uses up the noise."""

trajectory = jax.jit(
    functools.partial(image.sample, trajectory=True),
    static_argnums=0,
    static_argnames=("sampler", "head"),
)
"""`image.sample` with all states, the noise first."""

step = jax.jit(image.step, static_argnums=0, static_argnames=("head", "guided"))
"""`image.step`."""

resample = jax.jit(image.resample, static_argnums=0, static_argnames=("sampler", "first", "head"))
"""`image.resample`."""

edit = jax.jit(image.edit, static_argnums=0, static_argnames=("sampler", "first", "head"))
"""`image.edit`."""

decode = jax.jit(
    text.decode,
    static_argnums=0,
    static_argnames=("num_tokens", "eos_id"),
    donate_argnames="state",
)
"""`text.decode`, which uses up the state."""


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new")
def prefill(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Array,
    slots: Array | None,
    image_index: Array,
    slot_start: Array,
    slot_task: Array,
    lengths: Array,
    seeds: Array,
    max_new: int,
) -> text.State:
    """`text.prefill` of tokens int[B, P].

    Args:
      slots: of all images [M, S, D], of `encode_images`; image_index int[B, K] places them.
      seeds: uint32[B].
    """
    slots = None if slots is None else jnp.take(slots, image_index, axis=0)
    x = text.embed_prompt(model, params, tokens, slots, slot_start, slot_task)
    return text.prefill(model, params, x, lengths, jax.vmap(numerics.key)(seeds), max_new)


@functools.partial(jax.jit, static_argnums=0, static_argnames="most")
def log_likelihood(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Array,
    slots: Array,
    image_index: Array,
    slot_start: Array,
    slot_task: Array,
    target_mask: Array,
    most: int,
) -> Array:
    """`text.log_likelihood` of tokens int[B, P]; the images as of `prefill`."""
    slots = jnp.take(slots, image_index, axis=0)
    x = text.embed_prompt(model, params, tokens, slots, slot_start, slot_task)
    return text.log_likelihood(model, params, x, tokens, target_mask, most)


@functools.partial(jax.jit, static_argnums=0)
def encode_images(model: janusflow.JanusFlow, params: Any, vae_params: Any, pixels: Array) -> Array:
    """Understanding slots [M, S, D] of uint8[M, H, W, 3]."""
    x = encode.understanding_input(vae_params, pixels, model.cfg, model.dtype)
    return text.encode_images(model, params, x, IMAGES_AT_ONCE)


@functools.partial(jax.jit, static_argnums=1)
def draw_noise(seeds: Array, shape: tuple[int, ...]) -> Array:
    """float32[B, *shape], each row from its own seed alone."""
    return jax.vmap(lambda s: jax.random.normal(numerics.key(s), shape, jnp.float32))(seeds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def latents_to_pixels(
    cfg: ModelConfig, dtype: str, vae_params: Any, latents: Array
) -> tuple[Array, Array]:
    """Scaled latents float32[B, h, w, C] -> images uint8[B, H, W, 3], and whether the decoder's
    output was finite, bool[B]."""
    module = vae.Vae(cfg.vae, jnp.dtype(dtype))
    unscaled = vae.unscale(cfg.vae, latents)
    x = module.apply({"params": vae_params}, unscaled, method="decode")
    # NOTE(parity): rounded; the published demo truncates.
    pixels = jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)
    return pixels, jnp.isfinite(x).all((1, 2, 3))


@functools.partial(jax.jit, static_argnums=(0, 1))
def pixels_to_latents(cfg: ModelConfig, dtype: str, vae_params: Any, pixels: Array) -> Array:
    """uint8[B, H, W, 3] -> scaled latents float32[B, h, w, C], the mean of the posterior."""
    return encode.encode_latents(vae_params, pixels[:, None], None, cfg, jnp.dtype(dtype))[:, 0]
