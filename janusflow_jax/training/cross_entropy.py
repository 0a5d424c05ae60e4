"""Cross-entropy of next tokens. The head runs only where there are targets, in chunks.

On a mesh every chip keeps its part of the vocabulary and the head never moves: the devices that
share a head (`fsdp` and `tensor`) put their targets into one line and take it chunk by chunk, so
they also share the work of whoever has many. What is sent is hidden states of targets and a few
numbers a target. Gathering the head instead moves it once a chunk, and its gradient too.

The gradient is computed beside the loss, chunk by chunk (three matmuls; recomputing the logits in
the backward pass would make it four), so logits of one chunk are all that is ever held.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from janusflow_jax.config import LlamaConfig
from janusflow_jax.parallel import sharding

MOST_CHUNKS = 16
"""A group's chunk is at most this many of one device's: hidden states must be held too."""


class Plan(NamedTuple):
    """How a loss is split over the mesh."""

    size: int  # positions that a group takes at a time
    lines: int  # groups, each with its own line of targets
    group: str | None  # mesh axis along which devices join their targets
    vocab: tuple[str, ...]  # mesh axes over which the vocabulary is split
    everywhere: str | None  # mesh axis over which lines are added up


def plan(vocab_size: int, rows: int, length: int, chunk: int) -> Plan:
    """The split of the loss of [rows, length] positions on the current mesh.

    Args: chunk: positions of a device that the head takes at a time; 0: all at once.
    """
    fsdp, tensor = sharding.axis_size("fsdp"), sharding.axis_size("tensor")
    alone = sharding.current_mesh() is None
    split = not alone and rows % sharding.batch_size() == 0 and vocab_size % (fsdp * tensor) == 0
    if not split:
        line = rows * length
        return Plan(min(chunk or line, line), 1, None, (), None)
    line = rows * length // sharding.axis_size("data")
    size = min((chunk or line) * min(fsdp, MOST_CHUNKS), line)
    return Plan(size, sharding.axis_size("data"), "fsdp", ("fsdp", "tensor"), "data")


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
    how = plan(cfg.vocab_size, rows, length, chunk)
    labels = jnp.roll(tokens, -1, axis=1)

    def call(needed: tuple[bool, bool], *args: Any) -> tuple[Array, Array | None, Array | None]:
        def local(*args: Any) -> Any:
            return _local(how, needed, *args)

        if how.group is None:
            return local(*args)
        batch = P(sharding.BATCH)
        kernel = P(None, how.vocab)
        out = (P(), kernel if needed[0] else None, batch if needed[1] else None)
        return jax.shard_map(
            local, in_specs=(kernel, batch, batch, batch), out_specs=out, check_vma=False
        )(*args)

    @jax.custom_vjp
    def run(kernel: Array, hidden: Array, labels: Array, mask: Array) -> Array:
        return call((False, False), kernel, hidden, labels, mask)[0]

    def forward(kernel: Any, hidden: Any, labels: Any, mask: Any) -> tuple[Array, Any]:
        needed = (kernel.perturbed, hidden.perturbed)  # a frozen head gets no gradient
        args = (a.value for a in (kernel, hidden, labels, mask))
        loss, d_kernel, d_hidden = call(needed, *args)
        return loss, (d_kernel, d_hidden)

    def backward(saved: Any, g: Array) -> Any:
        scaled = [None if y is None else (g * y).astype(y.dtype) for y in saved]
        return (*scaled, None, None)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(head["kernel"], hidden, labels, mask)


def _local(
    how: Plan, needed: tuple[bool, bool], kernel: Array, hidden: Array, labels: Array, mask: Array
) -> tuple[Array, Array | None, Array | None]:
    """One device's part: the loss of all lines, and the gradients of its kernel and its states.

    Args: needed: which of the two gradients; kernel [D, V / vocab axes]; hidden [b, T, D].
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    labels, mask = labels.reshape(-1), mask.reshape(-1)
    order = jnp.argsort(~mask, stable=True)  # targets first
    count = jnp.sum(mask)
    first, total = _line(count, how.group)
    steps = -(-total // how.size)
    if how.everywhere:  # one number of chunks: whoever has done waits for the others anyway
        steps = lax.pmax(steps, how.everywhere)

    def take(i: Array) -> tuple[Array, Array, Array, Array]:
        """The chunk's states and labels on every device of the group, and where they came from."""
        at = i * how.size + jnp.arange(how.size)
        rank = at - first
        mine = (rank >= 0) & (rank < count)
        source = order[jnp.clip(rank, 0, len(order) - 1)]
        chunk = jnp.where(mine[:, None], x[source], 0)
        label = jnp.where(mine, labels[source], 0)
        if how.group:  # each position is of one device, so the sums are exact
            chunk, label = lax.psum((chunk, label), how.group)
        return chunk, label, at < total, jnp.where(mine, source, len(x))

    def body(i: Array, carry: Any) -> Any:
        loss, d_kernel, d_x = carry
        chunk, label, valid, source = take(i)
        part, d_logits = _losses(_logits(kernel, chunk), label, valid, how.vocab)
        d_logits = d_logits.astype(chunk.dtype)
        if needed[0]:
            d_kernel = d_kernel + jnp.einsum(
                "gd,gv->dv", chunk, d_logits, preferred_element_type=jnp.float32
            )
        if needed[1]:
            d_chunk = jnp.einsum(
                "gv,dv->gd",
                d_logits,
                kernel.astype(chunk.dtype),
                preferred_element_type=jnp.float32,
            )
            if how.vocab:
                d_chunk = lax.psum(d_chunk, how.vocab)
            d_x = d_x.at[source].set(d_chunk.astype(d_x.dtype), mode="drop", unique_indices=True)
        return loss + part, d_kernel, d_x

    start = (
        jnp.float32(0),
        jnp.zeros(kernel.shape, jnp.float32) if needed[0] else None,
        jnp.zeros_like(x) if needed[1] else None,
    )
    loss, d_kernel, d_x = lax.fori_loop(0, steps, body, start)
    if how.everywhere:
        loss = lax.psum(loss, how.everywhere)
        d_kernel = None if d_kernel is None else lax.psum(d_kernel, how.everywhere)
    return loss, d_kernel, None if d_x is None else d_x.reshape(hidden.shape)


def _line(count: Array, group: str | None) -> tuple[Array, Array]:
    """Where this device's targets begin in its group's line, and how long the line is."""
    if not group:
        return jnp.int32(0), count
    counts = lax.all_gather(count, group)
    before = jnp.arange(len(counts)) < lax.axis_index(group)
    return jnp.sum(jnp.where(before, counts, 0)), jnp.sum(counts)


def _logits(kernel: Array, x: Array) -> Array:
    """Float32 logits of this device's part of the vocabulary, as `llama.Llama.logits`."""
    return (x @ kernel.astype(x.dtype)).astype(jnp.float32)


def _losses(
    logits: Float[Array, "G V"],
    labels: Int[Array, " G"],
    valid: Bool[Array, " G"],
    axes: tuple[str, ...],
) -> tuple[Array, Float[Array, "G V"]]:
    """Summed loss of the valid positions, and its gradient by the logits.

    Args: logits: of this device's part of the vocabulary; axes: over which it is split.
    """
    width = logits.shape[1]
    top = jnp.max(logits, axis=1)
    here = labels
    if axes:
        top = lax.pmax(top, axes)
        here = labels - lax.axis_index(axes) * width
    inside = (here >= 0) & (here < width)
    spread = jnp.exp(logits - top[:, None])
    at_label = jnp.take_along_axis(logits, jnp.clip(here, 0, width - 1)[:, None], axis=1)[:, 0]
    norm, at_label = jnp.sum(spread, axis=1), jnp.where(inside, at_label, 0)
    if axes:
        norm, at_label = lax.psum((norm, at_label), axes)
    loss = jnp.sum(jnp.where(valid, top + jnp.log(norm) - at_label, 0))
    one_hot = (jnp.arange(width) == here[:, None]).astype(jnp.float32)
    return loss, jnp.where(valid[:, None], spread / norm[:, None] - one_hot, 0)


def head_positions(
    vocab_size: int, rows: int, length: int, chunk: int, targets: int
) -> tuple[int, int]:
    """On the current mesh: (positions that the head runs on, passes of its loop), where every
    group has its share of `targets`."""
    how = plan(vocab_size, rows, length, chunk)
    passes = math.ceil(targets / how.lines / how.size)
    return passes * how.size * how.lines, passes
