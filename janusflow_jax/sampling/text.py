"""Text decoding: prefill, then compiled chunks of tokens over a key-value buffer.

Prompts are right-padded to one length P; new token i of every row is written at buffer index
P + i, while its position is the row's own length + i. The mask hides the gap, so padding changes
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


def read_pictures(
    model: janusflow.JanusFlow, params: Any, images: Float[Array, "M ..."], chunk: int = 16
) -> Float[Array, "M S D"]:
    """Understanding slots of pictures, `chunk` at a time to bound the memory.

    Args: images: what `JanusFlow.understanding_slot` takes.
    """
    read = lambda x: model.apply({"params": params}, x, method="understanding_slot")  # noqa: E731
    if len(images) <= chunk or len(images) % chunk:
        return read(images)
    slots = lax.map(read, images.reshape(-1, chunk, *images.shape[1:]))
    return slots.reshape(-1, *slots.shape[2:])


def embed_prompt(
    model: janusflow.JanusFlow,
    params: Any,
    tokens: Int[Array, "B P"],
    slots: Float[Array, "B K S D"] | None,
    slot_start: Int[Array, "B K"],
    slot_task: Int[Array, "B K"],
) -> Float[Array, "B P D"]:
    """Prompt embeddings with the pictures' vectors (of `read_pictures`) in their places."""
    text = model.apply({"params": params}, tokens, method="embed_tokens")
    return (
        text if slots is None else janusflow.place_slots(text, None, slots, slot_start, slot_task)
    )


def start(
    model: janusflow.JanusFlow,
    params: Any,
    x: Float[Array, "B P D"],
    lengths: Int[Array, " B"],
    keys: Array,
    max_new: int,
) -> State:
    """Prefill: fills the key-value buffer and gives the logits of the first new token.

    Args: x: prompt embeddings, right-padded; keys: one random key a row; max_new: buffer room.
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
        "lengths": lengths,
        "prompt_len": jnp.int32(size),
        "step": jnp.int32(0),
        "done": jnp.zeros((batch,), bool),
        "keys": keys,
    }


def pick(
    logits: Float[Array, "B V"], keys: Array, temperature: Array, top_p: Array
) -> Int[Array, " B"]:
    """Next tokens: greedy at temperature 0, else nucleus sampling with each row's key."""

    def one(row: Array, key: Array) -> Array:
        scaled = row / jnp.maximum(temperature, 1e-6)
        order = jnp.argsort(-scaled)
        probs = jax.nn.softmax(scaled[order])
        before = jnp.cumsum(probs) - probs
        kept = jnp.where((before < top_p) | (jnp.arange(len(row)) == 0), scaled[order], -jnp.inf)
        return order[jax.random.categorical(key, kept)]

    greedy = jnp.argmax(logits, axis=-1)
    sampled = lax.cond(temperature > 0, lambda: jax.vmap(one)(logits, keys), lambda: greedy)
    return sampled.astype(jnp.int32)


def advance(
    model: janusflow.JanusFlow,
    params: Any,
    state: State,
    temperature: Array,
    top_p: Array,
    *,
    num_tokens: int,
    eos_id: int,
) -> tuple[State, Int[Array, "B N"]]:
    """Decodes up to `num_tokens` more, stopping early when every row has met eos.

    Returns: the state, and the tokens; after a row's eos they are eos.
    """
    run = {"params": params}
    batch = len(state["lengths"])
    tokens = jnp.full((batch, num_tokens), eos_id, jnp.int32)
    total = jax.tree.leaves(state["cache"])[0].shape[-3]

    def cond(carry: tuple[Array, State, Array]) -> Array:
        i, s, _ = carry
        return (i < num_tokens) & ~jnp.all(s["done"])

    def body(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        i, s, out = carry
        keys = jax.vmap(lambda key: jax.random.fold_in(key, s["step"]))(s["keys"])
        token = jnp.where(s["done"], eos_id, pick(s["logits"], keys, temperature, top_p))
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1)
        at = s["prompt_len"] + s["step"]
        k = jnp.arange(total)
        mask = (k < s["lengths"][:, None]) | ((k >= s["prompt_len"]) & (k <= at))
        x = model.apply(run, token[:, None], method="embed_tokens")
        hidden, _, cache = model.apply(
            run,
            x,
            (s["lengths"] + s["step"])[:, None],
            mask[:, None],
            cache=s["cache"],
            index=at,
            keep="kv",
            method="run_llm",
        )
        logits = model.apply(run, hidden[:, 0], method="logits")
        done = s["done"] | (token == eos_id)
        s = {**s, "cache": cache, "logits": logits, "step": s["step"] + 1, "done": done}
        return i + 1, s, out

    _, state, tokens = lax.while_loop(cond, body, (jnp.int32(0), state, tokens))
    return state, tokens
