"""Text generation: prefill, then compiled chunks of tokens over a buffer of keys and values.

Prompts are right-padded to one length P. New token i of every row is written at index P + i of the
buffer, but its position is the length of the row + i. The mask hides the gap, so padding changes
nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from janusflow_jax.models import janusflow, llama

State = dict[str, Any]


def encode_images(
    model: janusflow.JanusFlow, params: Any, images: Float[Array, "M ..."], chunk: int = 16
) -> Float[Array, "M S D"]:
    """Understanding slots of images, `chunk` at a time to bound the memory.

    Args:
      images: the input of `JanusFlow.understanding_slot`.
    """
    encode = lambda x: model.apply({"params": params}, x, method="understanding_slot")  # noqa: E731
    if len(images) <= chunk or len(images) % chunk:
        return encode(images)
    slots = lax.map(encode, images.reshape(-1, chunk, *images.shape[1:]))
    return slots.reshape(-1, *slots.shape[2:])


def embed_prompt(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    slots: Float[Array, "B K S D"] | None,
    slot_start: Int[Array, "B K"],
    slot_task: Int[Array, "B K"],
) -> Float[Array, "B P D"]:
    """Prompt embeddings with the vectors of the images (of `encode_images`) in their slots."""
    text = model.apply({"params": params}, tokens, method="embed_tokens")
    return janusflow.place_slots(text, None, slots, slot_start, slot_task)


def prefill(
    model: janusflow.JanusFlow,
    params: Any,
    x: Float[Array, "B P D"],
    lengths: Int[Array, " B"],
    keys: Array,
    max_new: int,
) -> State:
    """Fills the buffer with the prompt and computes the logits of the first new token.

    Args:
      x: prompt embeddings, right-padded.
      keys: one random key a row.
      max_new: number of new tokens that the buffer has room for.
    """
    batch, size, _ = x.shape
    buffer = llama.empty_cache(model.cfg.llm, params["llm"], batch, size + max_new, x.dtype)
    q, k = jnp.arange(size)[:, None], jnp.arange(size + max_new)[None]
    mask = ((k <= q)[None] & (k < lengths[:, None])[:, None]) | (k == q)[None]
    positions = jnp.broadcast_to(jnp.arange(size), (batch, size))
    run = {"params": params}
    hidden, _, cache = model.apply(
        run, x, positions, mask, cache=buffer, index=0, keep="kv", method="run_llm"
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logits = model.apply(run, last[:, 0], method="logits")
    return {
        "cache": cache,
        "logits": logits,
        "finite": jnp.isfinite(logits).all(-1),
        "lengths": lengths,
        "prompt_len": jnp.int32(size),
        "step": jnp.int32(0),
        "done": jnp.zeros((batch,), bool),
        "keys": keys,
    }


def sample_token(
    logits: Float[Array, "B V"], keys: Array, temperature: Array, top_p: Array
) -> Int[Array, " B"]:
    """Next tokens: greedy at temperature 0, else nucleus sampling with the key of each row."""

    def sample_row(row: Array, key: Array) -> Array:
        scaled = row / jnp.maximum(temperature, 1e-6)
        order = jnp.argsort(-scaled)
        probs = jax.nn.softmax(scaled[order])
        before = jnp.cumsum(probs) - probs
        nucleus = (before < top_p) | (jnp.arange(len(row)) == 0)
        return order[jax.random.categorical(key, jnp.where(nucleus, scaled[order], -jnp.inf))]

    greedy = jnp.argmax(logits, axis=-1)
    sampled = lax.cond(temperature > 0, lambda: jax.vmap(sample_row)(logits, keys), lambda: greedy)
    return sampled.astype(jnp.int32)


def decode(
    model: janusflow.JanusFlow,
    params: Any,
    state: State,
    temperature: Array,
    top_p: Array,
    *,
    num_tokens: int,
    eos_id: int,
) -> tuple[State, Int[Array, "B N"]]:
    """Generates up to `num_tokens` more tokens; stops once every row has reached EOS.

    Returns:
      the state, whose `finite` bool[B] is whether the logits of a row were finite so far; and the
      tokens, EOS after the end of a row.
    """
    run = {"params": params}
    batch = len(state["lengths"])
    tokens = jnp.full((batch, num_tokens), eos_id, jnp.int32)
    total = jax.tree.leaves(state["cache"])[0].shape[-3]

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        i, s, _ = carry
        return (i < num_tokens) & ~jnp.all(s["done"])

    def step(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        i, s, out = carry
        keys = jax.vmap(lambda key: jax.random.fold_in(key, s["step"]))(s["keys"])
        token = sample_token(s["logits"], keys, temperature, top_p)
        token = jnp.where(s["done"], eos_id, token)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1)
        index = s["prompt_len"] + s["step"]
        k = jnp.arange(total)
        mask = (k < s["lengths"][:, None]) | ((k >= s["prompt_len"]) & (k <= index))
        x = model.apply(run, token[:, None], method="embed_tokens")
        hidden, _, cache = model.apply(
            run,
            x,
            (s["lengths"] + s["step"])[:, None],
            mask[:, None],
            cache=s["cache"],
            index=index,
            keep="kv",
            method="run_llm",
        )
        logits = model.apply(run, hidden[:, 0], method="logits")
        done = s["done"] | (token == eos_id)
        finite = s["finite"] & (done | jnp.isfinite(logits).all(-1))
        s = {**s, "cache": cache, "logits": logits, "finite": finite}
        s = {**s, "step": s["step"] + 1, "done": done}
        return i + 1, s, out

    _, state, tokens = lax.while_loop(unfinished, step, (jnp.int32(0), state, tokens))
    return state, tokens
