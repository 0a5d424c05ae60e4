"""Cross-entropy of next tokens. The head runs only where there are targets, in chunks.

The targets of a device's rows are put in front of its other positions, and chunks are computed
until the fullest device has none left. The gradient is computed beside the loss, chunk by chunk
(three matmuls; recomputing the logits in the backward pass would make it four), so logits of one
chunk are all that is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from janusflow_jax import sharding
from janusflow_jax.config import LlamaConfig
from janusflow_jax.models import llama


def summed(
    cfg: LlamaConfig,
    head: Any,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Summed cross-entropy of the next token over the positions in `mask`.

    Args:
      head: its parameters; hidden: the LLM's normed states.
      tokens: of the row; position i is asked for tokens[i + 1].
      chunk: positions of a device that the head takes at a time; 0: all at once.
    """
    rows, length = tokens.shape
    shards = sharding.batch_size() if rows % sharding.batch_size() == 0 else 1
    line = rows // shards * length  # positions of one device
    size = min(chunk or line, line)

    def lines(x: Array) -> Array:
        return x.reshape(shards, line, *x.shape[2:])

    mask = lines(mask)
    order = jnp.argsort(~mask, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -line % size)))
    x = sharding.constrain(lines(hidden), "batch", None, None)
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    labels = jnp.take_along_axis(lines(jnp.roll(tokens, -1, axis=1)), order, axis=1)

    def logits(head: Any, x: Array) -> Array:
        return sharding.constrain(llama.logits(cfg, head, x), "batch", None, "tensor")

    return _chunked(logits, size)(head, x, labels, jnp.sum(mask, axis=1))


def _chunked(logits: Callable[[Any, Array], Array], size: int) -> Callable[..., Array]:
    """(head, x[S, N, D], labels[S, N], counts[S]) -> the loss summed over each line's first
    `counts` positions, `size` of every line at a time."""

    def part(head: Any, x: Array, labels: Array, keep: Array) -> Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits(head, x), labels)
        return jnp.sum(jnp.where(keep, loss, 0.0))

    def take(i: Array, x: Array, labels: Array, counts: Array) -> tuple[Array, Array, Array]:
        at = i * size
        keep = at + jnp.arange(size) < counts[:, None]
        return (
            lax.dynamic_slice_in_dim(x, at, size, 1),
            lax.dynamic_slice_in_dim(labels, at, size, 1),
            keep,
        )

    def num_chunks(counts: Array) -> Array:
        return -(-jnp.max(counts) // size)

    @jax.custom_vjp
    def run(head: Any, x: Array, labels: Array, counts: Array) -> Array:
        def body(i: Array, total: Array) -> Array:
            return total + part(head, *take(i, x, labels, counts))

        return lax.fori_loop(0, num_chunks(counts), body, jnp.float32(0))

    def forward(head: Any, x: Array, labels: Array, counts: Array) -> tuple[Array, Any]:
        def body(i: Array, carry: Any) -> Any:
            total, d_head, d_x = carry
            chunk, label, keep = take(i, x, labels, counts)
            loss, (dh, dx) = jax.value_and_grad(part, (0, 1))(head, chunk, label, keep)
            d_x = lax.dynamic_update_slice_in_dim(d_x, dx, i * size, 1)
            return total + loss, jax.tree.map(jnp.add, d_head, dh), d_x

        zeros = sharding.constrain_params(jax.tree.map(jnp.zeros_like, head), "llm/head")
        start = (jnp.float32(0), zeros, jnp.zeros_like(x))
        total, d_head, d_x = lax.fori_loop(0, num_chunks(counts), body, start)
        return total, (d_head, d_x)

    def backward(saved: Any, g: Array) -> Any:
        d_head, d_x = saved
        scale = lambda t: jax.tree.map(lambda y: (g * y).astype(y.dtype), t)  # noqa: E731
        return scale(d_head), scale(d_x), None, None

    run.defvjp(forward, backward)
    return run
