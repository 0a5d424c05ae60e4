"""Text generation: prefill, then compiled chunks of tokens over a buffer of keys and values.

Index i of the buffer is position i of a row. Prompts are right-padded; new tokens overwrite the
padding, and the mask hides what is left of it. So rows may begin and end at any time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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


def extend(
    model: janusflow.JanusFlow,
    params: Any,
    x: Float[Array, "B C D"],
    cache: llama.Cache,
    begin: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
) -> tuple[llama.Cache, Float[Array, "B V"]]:
    """Writes the next positions of prompts, `begin` and those after it, into a buffer.

    Returns:
      the buffer, and the logits after each prompt's last position if that is among them.
    """
    size = jax.tree.leaves(cache)[0].shape[-3]
    positions = begin + jnp.arange(x.shape[1])
    mask = jnp.arange(size) <= positions[:, None]
    hidden, _, cache = model.apply(
        {"params": params},
        x,
        jnp.broadcast_to(positions, x.shape[:2]),
        jnp.broadcast_to(mask, (len(x), *mask.shape)),
        cache=cache,
        index=begin,
        keep="kv",
        method="run_llm",
    )
    last = jnp.clip(lengths - 1 - begin, 0, x.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return cache, model.apply({"params": params}, hidden, method="logits")


def prefill(
    model: janusflow.JanusFlow,
    params: Any,
    x: Float[Array, "B P D"],
    lengths: Int[Array, " B"],
    keys: Array,
    max_new: int,
) -> State:
    """Fills a buffer with prompts and computes the logits of their first new tokens.

    Args:
      x: prompt embeddings, right-padded.
      keys: one random key a row.
      max_new: number of new tokens that the buffer has room for.
    """
    batch, size, _ = x.shape
    buffer = llama.empty_cache(model.cfg.llm, params["llm"], batch, size + max_new, x.dtype)
    cache, logits = extend(model, params, x, buffer, 0, lengths)
    return decoding(cache, logits, lengths, keys)


def log_likelihood(
    model: janusflow.JanusFlow,
    params: Any,
    x: Float[Array, "B P D"],
    tokens: Int[Array, "B P"],
    target_mask: Bool[Array, "B P"],
    most: int,
) -> Float[Array, " B"]:
    """The summed log-likelihood of the targets of rows, float32.

    Args:
      x: embeddings of the tokens and images, right-padded.
      target_mask: where the next position's token is a target.
      most: no row has more targets.
    """
    positions = jnp.arange(x.shape[1])
    causal = (positions[:, None] >= positions)[None]
    at = jnp.broadcast_to(positions, tokens.shape)
    mask = jnp.broadcast_to(causal, (len(x), *causal.shape[1:]))
    hidden, _, _ = model.apply({"params": params}, x, at, mask, method="run_llm")
    index = jnp.argsort(~target_mask, stable=True)[:, :most]
    hidden = jnp.take_along_axis(hidden, index[..., None], axis=1)
    logits = model.apply({"params": params}, hidden, method="logits").astype(jnp.float32)
    target = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), index, axis=1)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=2)[..., 0]
    return jnp.sum(each, axis=1, where=jnp.take_along_axis(target_mask, index, axis=1))


def decoding(
    cache: llama.Cache, logits: Float[Array, "B V"], lengths: Int[Array, " B"], keys: Array
) -> State:
    """The state of `decode` after prompts of these lengths."""
    return {
        "cache": cache,
        "logits": logits,
        "finite": jnp.isfinite(logits).all(-1),
        "length": lengths,
        "generated": jnp.zeros_like(lengths),
        "done": jnp.zeros(lengths.shape, bool),
        "keys": keys,
    }


def sample_token(
    logits: Float[Array, "B V"],
    keys: Array,
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
) -> Int[Array, " B"]:
    """Next tokens: greedy at temperature 0, else nucleus sampling with the key of each row."""

    def sample_row(row: Array, key: Array, temperature: Array, top_p: Array) -> Array:
        scaled = row / jnp.maximum(temperature, 1e-6)
        order = jnp.argsort(-scaled)
        probs = jax.nn.softmax(scaled[order])
        before = jnp.cumsum(probs) - probs
        nucleus = (before < top_p) | (jnp.arange(len(row)) == 0)
        return order[jax.random.categorical(key, jnp.where(nucleus, scaled[order], -jnp.inf))]

    greedy = jnp.argmax(logits, axis=-1)
    sampled = lax.cond(
        jnp.any(temperature > 0),
        lambda: jax.vmap(sample_row)(logits, keys, temperature, top_p),
        lambda: greedy,
    )
    return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)


def decode(
    model: janusflow.JanusFlow,
    params: Any,
    state: State,
    temperature: Float[Array, "*b"],
    top_p: Float[Array, "*b"],
    *,
    num_tokens: int,
    eos_id: int,
) -> tuple[State, Int[Array, "B N"]]:
    """Generates up to `num_tokens` more tokens; stops once every row has reached EOS.

    Args:
      state: `length` int[B] positions and `generated` int[B] tokens so far; a row is `done` after
        EOS.
      temperature, top_p: one for all rows, or one a row.
    Returns:
      the state, whose `finite` bool[B] is whether the logits of a row were finite so far; and the
      tokens, EOS after the end of a row.
    """
    run = {"params": params}
    batch = len(state["length"])
    tokens = jnp.full((batch, num_tokens), eos_id, jnp.int32)
    total = jax.tree.leaves(state["cache"])[0].shape[-3]
    temperature, top_p = (jnp.broadcast_to(x, (batch,)) for x in (temperature, top_p))

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        i, s, _ = carry
        return (i < num_tokens) & ~jnp.all(s["done"])

    def step(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        i, s, out = carry
        keys = jax.vmap(jax.random.fold_in)(s["keys"], s["generated"])
        token = sample_token(s["logits"], keys, temperature, top_p)
        token = jnp.where(s["done"], eos_id, token)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1)
        position = s["length"]
        hidden, _, cache = model.apply(
            run,
            model.apply(run, token[:, None], method="embed_tokens"),
            position[:, None],
            (jnp.arange(total) <= position[:, None])[:, None],
            cache=s["cache"],
            index=position,
            keep="kv",
            method="run_llm",
        )
        logits = model.apply(run, hidden[:, 0], method="logits")
        more = jnp.where(s["done"], 0, 1)
        done = s["done"] | (token == eos_id)
        finite = s["finite"] & (done | jnp.isfinite(logits).all(-1))
        s = {**s, "cache": cache, "logits": logits, "finite": finite, "done": done}
        s = {**s, "length": position + more, "generated": s["generated"] + more}
        return i + 1, s, out

    _, state, tokens = lax.while_loop(unfinished, step, (jnp.int32(0), state, tokens))
    return state, tokens
