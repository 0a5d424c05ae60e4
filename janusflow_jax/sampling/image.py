"""Text to latents: the prompt's keys and values once, then Euler steps over the image slot.

The unconditional branch keeps BOS and masks the rest of the prompt without moving positions
(SPEC section 3). BOS sees only itself, so both branches read the same cached prefix and differ
in the mask alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

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
    mask = mask | jnp.eye(size, dtype=bool)  # padding sees itself, so that softmax is finite
    positions = jnp.broadcast_to(index, tokens.shape)
    run = {"params": params}
    x = model.apply(run, tokens, method="embed_tokens")
    _, _, cache = model.apply(run, x, positions, mask, keep="kv", method="run_llm")
    return cache


def slot_masks(lengths: Int[Array, " B"], prompt_len: int, slot_len: int) -> tuple[Array, Array]:
    """What the slot's positions see: bool[B, S, P + S] with the prompt, and with BOS alone."""
    causal = jnp.tril(jnp.ones((slot_len, slot_len), bool))
    index = jnp.arange(prompt_len)

    def join(seen: Array) -> Array:
        seen = jnp.broadcast_to(seen[:, None], (len(lengths), slot_len, prompt_len))
        own = jnp.broadcast_to(causal, (len(lengths), slot_len, slot_len))
        return jnp.concatenate([seen, own], axis=-1)

    cond = index < lengths[:, None]
    return join(cond), join(jnp.broadcast_to(index == 0, cond.shape))


def make_velocity(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    guided: bool,
) -> flow.Velocity:
    """The velocity field of a batch of prompts, with the prompt computed once.

    Args:
      tokens: prompts, BOS first, right-padded; lengths: their true lengths.
      guided: also give the unconditional velocity.
    """
    run = {"params": params}
    size, slot_len = tokens.shape[1], model.cfg.slot_len
    cache = prefill(model, params, tokens, lengths)
    cond, uncond = slot_masks(lengths, size, slot_len)
    positions = lengths[:, None] + jnp.arange(slot_len)
    branches = 2 if guided else 1
    mask = jnp.concatenate([cond, uncond]) if guided else cond
    repeat = lambda x, axis=0: jnp.concatenate([x] * branches, axis=axis)  # noqa: E731
    cache = jax.tree.map(lambda x: repeat(x, x.ndim - 4), cache)
    positions = repeat(positions)

    def velocity(z: Array, t: Array) -> tuple[Array, Array | None]:
        times = jnp.full((len(z),), t, jnp.float32)
        slot, features, t_emb = model.apply(run, z, times, method="generation_slot")
        hidden, _, _ = model.apply(
            run, repeat(slot), positions, mask, cache=cache, method="run_llm"
        )
        v = model.apply(run, hidden[:, 1:], repeat(features), repeat(t_emb), method="velocity")
        return (v[: len(z)], v[len(z) :]) if guided else (v, None)

    return velocity


def sample(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    noise: Float[Array, "B h w C"],
    cfg_weight: float | Array,
    *,
    num_steps: int,
    guided: bool,
    trajectory: bool = False,
) -> Float[Array, "..."]:
    """Latents (scaled) of a batch of prompts.

    Returns: float32[B, h, w, C], or with `trajectory` float32[N + 1, B, h, w, C], noise first.
    """
    velocity = make_velocity(model, params, tokens, lengths, guided)
    latents, states = flow.euler(velocity, noise, num_steps, cfg_weight)
    if not trajectory:
        return latents
    return lax.concatenate([noise[None].astype(jnp.float32), states], 0)
