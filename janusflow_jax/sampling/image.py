"""Text to latents: keys and values of the prompt once, then steps over the image slot.

The unconditional branch keeps the prompt's head (BOS, or nothing) and masks the rest, as training
drops a prompt; positions do not move (docs/model.md). BOS attends to itself only, so both branches
use the same cached prefix and differ in the mask alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from janusflow_jax.config import SamplerConfig
from janusflow_jax.models import janusflow
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


def slot_masks(
    lengths: Int[Array, " B"], prompt_len: int, slot_len: int, head: int
) -> tuple[Array, Array]:
    """Masks bool[B, S, P + S] of the slot: with the whole prompt, and with its head alone."""
    causal = jnp.tril(jnp.ones((slot_len, slot_len), bool))
    index = jnp.arange(prompt_len)

    def join(prompt: Array) -> Array:
        prompt = jnp.broadcast_to(prompt[:, None], (len(lengths), slot_len, prompt_len))
        slot = jnp.broadcast_to(causal, (len(lengths), slot_len, slot_len))
        return jnp.concatenate([prompt, slot], axis=-1)

    cond = index < lengths[:, None]
    return join(cond), join(jnp.broadcast_to(index < head, cond.shape))


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
        jnp.concatenate([cond, uncond]),
        twice(positions),
        jax.tree.map(lambda x: twice(x, x.ndim - 4), cache),
    )

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    def velocity(z: Array, t: Array, guided: bool) -> tuple[Array, Array | None]:
        mask, at, prefix = both if guided else (cond, positions, cache)
        repeat = twice if guided else lambda x: x
        slot, features, t_emb = run("generation_slot", z, jnp.full((len(z),), t, jnp.float32))
        hidden, _, _ = run("run_llm", repeat(slot), at, mask, cache=prefix)
        v = run("velocity", hidden[:, 1:], repeat(features), repeat(t_emb))
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
