"""Prompts to latents: keys and values of the prompt once, then steps over the image slot.

The unconditional branch keeps the prompt's head (BOS, or nothing) and masks the rest, as training
drops a prompt; positions do not move (docs/model.md). BOS attends to itself only, so both branches
use the same cached prefix and differ in the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from janusflow_jax.config import SamplerConfig
from janusflow_jax.models import janusflow
from janusflow_jax.parallel import numerics
from janusflow_jax.sampling import flow


def prefill(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
) -> Any:
    """Keys and values of right-padded prompts, a `llama.Cache`."""
    size = tokens.shape[1]
    index = jnp.arange(size)
    mask = (index[:, None] >= index)[None] & (index < lengths[:, None])[:, None]
    mask = mask | jnp.eye(size, dtype=bool)  # padding attends to itself: softmax stays finite
    positions = jnp.broadcast_to(index, tokens.shape)
    x = model.apply({"params": params}, tokens, method="embed_tokens")
    _, _, cache = model.apply({"params": params}, x, positions, mask, keep="kv", method="run_llm")
    return cache


def slot_mask(seen: Int[Array, " R"], prompt_len: int, slot_len: int) -> Bool[Array, "R S K"]:
    """The mask of a slot behind the first `seen` positions of each prompt."""
    causal = jnp.tril(jnp.ones((slot_len, slot_len), bool))
    prompt = (jnp.arange(prompt_len) < seen[:, None])[:, None]
    prompt = jnp.broadcast_to(prompt, (len(seen), slot_len, prompt_len))
    slot = jnp.broadcast_to(causal, (len(seen), slot_len, slot_len))
    return jnp.concatenate([prompt, slot], axis=-1)


def slot_masks(
    lengths: Int[Array, " B"], prompt_len: int, slot_len: int, head: int
) -> tuple[Array, Array]:
    """Masks bool[B, S, P + S] of the slot: with the whole prompt, and with its head alone."""
    seen = (lengths, jnp.full_like(lengths, head))
    cond, uncond = (slot_mask(x, prompt_len, slot_len) for x in seen)
    return cond, uncond


def velocities(
    model: janusflow.JanusFlow,
    params: Any,
    z: Float[Array, "B h w C"],
    t: Float[Array, " B"],
    r: Float[Array, " B"],
    prefix: Any,
    mask: Bool[Array, "R S K"],
    positions: Int[Array, "R S"],
    to_rows: Callable[[Array], Array],
) -> Float[Array, "R h w C"]:
    """The velocities of rows; a row is a branch (conditional or not) of an image.

    Args:
      z, t: of images. r: the times that their steps end at, for a student.
      prefix, mask, positions: of rows: the prompts (of `prefill`), what the slots attend to (of
        `slot_mask`), and where they are.
      to_rows: arrays of images [B, ...] -> [R, ...].
    """

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    slot, features, t_emb = run("generation_slot", z, t)
    hidden, _, _ = run("run_llm", to_rows(slot), positions, mask, cache=prefix)
    if model.cfg.student.steps:
        t_emb = run("embed_time", r)
    return run("velocity", hidden[:, 1:], to_rows(features), to_rows(t_emb))


def velocity_field(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    head: int,
) -> flow.Velocity:
    """The velocity field of a batch of prompts; the prompts are computed once, not every step.

    Args:
      tokens: prompts, right-padded.
      lengths: of the prompts, without padding.
      head: `ChatFormat.head`, the tokens that the unconditional branch keeps.
    """
    cache = prefill(model, params, tokens, lengths)
    cond, uncond = slot_masks(lengths, tokens.shape[1], model.cfg.slot_len, head)
    positions = lengths[:, None] + jnp.arange(model.cfg.slot_len)
    twice = lambda x, axis=0: jnp.concatenate([x, x], axis=axis)  # noqa: E731
    # With guidance both branches run as one batch of twice the size.
    both = (
        jax.tree.map(lambda x: twice(x, x.ndim - 4), cache),
        jnp.concatenate([cond, uncond]),
        twice(positions),
    )

    def velocity(z: Array, t: Array, r: Array, guided: bool) -> tuple[Array, Array | None]:
        rows = both if guided else (cache, cond, positions)
        to_rows = twice if guided else lambda x: x
        t, r = (jnp.full((len(z),), x, jnp.float32) for x in (t, r))
        v = velocities(model, params, z, t, r, *rows, to_rows)
        return (v[: len(z)], v[len(z) :]) if guided else (v, None)

    return velocity


def sample(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    noise: Float[Array, "B h w C"],
    guidance_scale: float | Array,
    *,
    head: int,
    sampler: SamplerConfig,
    trajectory: bool = False,
) -> Float[Array, "..."]:
    """Scaled latents of a batch of prompts; arguments as in `velocity_field`.

    Returns:
      float32[B, h, w, C]; with `trajectory` float32[N + 1, B, h, w, C], the noise first.
    """
    velocity = velocity_field(model, params, tokens, lengths, head)
    latents, states = flow.solve(velocity, noise, guidance_scale, sampler)
    if not trajectory:
        return latents
    return lax.concatenate([noise[None].astype(jnp.float32), states], 0)


def step(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    z: Float[Array, "B h w C"],
    before: Float[Array, "B h w C"] | None,
    node: tuple[Any, Any, Any, Any],
    guidance_scale: float | Array,
    *,
    head: int,
    guided: bool,
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"] | None]:
    """One step of `sample`; it computes the prompts too.

    Args:
      before: the velocity of the last step; None for Euler's method.
      node: the times before and after the step, h and r/2 (`flow.step_times`,
        `flow.coefficients`).
    Returns:
      the next state, and the velocity if `before` was given.
    """
    t, t_next, h, half_r = node
    velocity = velocity_field(model, params, tokens, lengths, head)
    v = flow.guide(*velocity(z, t, t_next, guided), guidance_scale)
    return flow.advance(z, v, before, h, half_r), None if before is None else v


def resample(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    noise: Float[Array, "B h w C"],
    x: Float[Array, "B h w C"],
    keep: Bool[Array, "B h w"] | None,
    guidance_scale: float | Array,
    *,
    head: int,
    sampler: SamplerConfig,
    first: int,
) -> Float[Array, "B h w C"]:
    """Latents of images that are generated again from step `first` on.

    Args:
      x: scaled latents of the images.
      keep: the cells that stay on the path from their noise to x (inpainting); None: no cell.
    """
    t = flow.solver_times(sampler)[first]
    z = flow.interpolate(x, noise, jnp.full(len(x), t, jnp.float32))

    def project(z: Array, t: Array) -> Array:
        assert keep is not None
        return jnp.where(keep[..., None], t * x + (1 - t) * noise, z)

    velocity = velocity_field(model, params, tokens, lengths, head)
    z, _ = flow.solve(
        velocity, z, guidance_scale, sampler, first, None if keep is None else project
    )
    return z


def edit(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "R P"],
    lengths: Int[Array, " R"],
    seeds: UInt32[Array, " B"],
    x: Float[Array, "B h w C"],
    guidance_scales: Float[Array, " R"],
    *,
    head: int,
    sampler: SamplerConfig,
    first: int,
) -> Float[Array, "B h w C"]:
    """`flow.edit` of images with latents x; the prompts of the sources come first."""

    def draw(seed: Array, k: Array) -> Array:
        key = jax.random.fold_in(numerics.key(seed), k)
        return jax.random.normal(key, x.shape[1:], jnp.float32)

    def noise(k: Array) -> Array:
        return jax.vmap(draw, (0, None))(seeds, k)

    velocity = velocity_field(model, params, tokens, lengths, head)
    return flow.edit(velocity, x, noise, guidance_scales, sampler, first)
