"""Cross-entropy of next tokens. The head runs on targets only, in chunks.

On a mesh each device keeps its part of the vocabulary and the head never moves. The devices that
share a head (`fsdp` and `tensor`) put their targets into one queue and work on it chunk by chunk,
so they also share the work of a device with many targets. Only hidden states of targets and a few
numbers per target are sent. Gathering the head instead would send it, and its gradient, for every
chunk.

The gradient is computed together with the loss, chunk by chunk, so only the logits of one chunk are
in memory. That takes three matmuls; recomputing the logits in the backward pass would take four.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from janusflow_jax.parallel import sharding

MAX_CHUNKS = 16
"""A group's chunk is at most this many chunks of one device: its hidden states take memory too."""


class Split(NamedTuple):
    """How a loss is split over the mesh."""

    size: int  # positions in a chunk of a group
    groups: int  # each has its own queue of targets
    group: str | None  # mesh axis of the devices that share a queue
    vocab: tuple[str, ...]  # mesh axes over which the vocabulary is split
    data: str | None  # mesh axis over which the losses of the groups are added


def split(vocab_size: int, rows: int, length: int, chunk: int) -> Split:
    """The split of the loss of [rows, length] positions on the current mesh.

    Args:
      chunk: positions of a device that the head processes at a time; 0: all.
    """
    fsdp, tensor = sharding.axis_size("fsdp"), sharding.axis_size("tensor")
    divides = rows % sharding.batch_size() == 0 and vocab_size % (fsdp * tensor) == 0
    if sharding.current_mesh() is None or not divides:
        queue = rows * length
        return Split(min(chunk or queue, queue), 1, None, (), None)
    queue = rows * length // sharding.axis_size("data")
    size = min((chunk or queue) * min(fsdp, MAX_CHUNKS), queue)
    return Split(size, sharding.axis_size("data"), "fsdp", ("fsdp", "tensor"), "data")


@jax.named_scope("cross_entropy")
def summed(
    kernel: Float[Array, "D V"],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    source_ids: Int[Array, "B T"],
    source_weights: Float[Array, " S"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, " S"]]:
    """Summed cross-entropy of the next token over the positions in `mask`.

    Args:
      kernel: of the LLM's head.
      hidden: final states of the LLM.
      tokens: of the rows; the target of position i is tokens[i + 1].
      source_ids: the data source of each position.
      source_weights: factor of each source's losses.
      chunk: positions of a device that the head processes at a time; 0: all.
    Returns:
      The weighted sum, and each source's sum without its weight. Only the first has a gradient.
    """
    how = split(kernel.shape[1], tokens.shape[0], tokens.shape[1], chunk)
    labels = jnp.roll(tokens, -1, axis=1)

    def call(needed: tuple[bool, bool], *args: Any) -> tuple[Any, Array | None, Array | None]:
        def local(*args: Any) -> Any:
            return _local(how, needed, *args)

        if how.group is None:
            return local(*args)
        batch, head = P(sharding.BATCH), P(None, how.vocab)
        specs = (head, batch, batch, batch, batch, P())
        out = (P(), head if needed[0] else None, batch if needed[1] else None)
        return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(*args)

    @jax.custom_vjp
    def run(*args: Array) -> tuple[Array, Array]:
        return call((False, False), *args)[0]

    def forward(*args: Any) -> tuple[tuple[Array, Array], Any]:
        needed = (args[0].perturbed, args[1].perturbed)  # a frozen head gets no gradient
        sums, d_kernel, d_hidden = call(needed, *(a.value for a in args))
        return sums, (d_kernel, d_hidden)

    def backward(saved: Any, g: tuple[Array, Any]) -> Any:
        scaled = [None if y is None else (g[0] * y).astype(y.dtype) for y in saved]
        return (*scaled, None, None, None, None)

    run.defvjp(forward, backward, symbolic_zeros=True)
    total, by_source = run(kernel, hidden, labels, mask, source_ids, source_weights)
    return total, lax.stop_gradient(by_source)


def _local(
    how: Split,
    needed: tuple[bool, bool],
    kernel: Array,
    hidden: Array,
    labels: Array,
    mask: Array,
    source_ids: Array,
    source_weights: Array,
) -> tuple[tuple[Array, Array], Array | None, Array | None]:
    """The part of one device: the sums of all groups; gradients of its kernel and its states.

    Args:
      needed: which of the two gradients to compute.
      kernel: [D, V / vocab axes]; hidden: [b, T, D].
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    labels, mask, source_ids = (a.reshape(-1) for a in (labels, mask, source_ids))
    order = jnp.argsort(~mask, stable=True)  # targets first
    count = jnp.sum(mask)
    first, total = _queue(count, how.group)
    steps = -(-total // how.size)
    if how.data:  # every group runs as many chunks: it would wait for the slowest anyway
        steps = lax.pmax(steps, how.data)

    def gather_chunk(i: Array) -> tuple[Array, Array, Array, Array, Array]:
        """States, labels and sources of a chunk on every device of the group; which of its places
        are targets; the positions of this device's."""
        place = i * how.size + jnp.arange(how.size)
        rank = place - first
        mine = (rank >= 0) & (rank < count)
        position = order[jnp.clip(rank, 0, len(order) - 1)]
        chunk = jnp.where(mine[:, None], x[position], 0)
        label, source = (jnp.where(mine, a[position], 0) for a in (labels, source_ids))
        if how.group:  # each position belongs to one device, so the sums are exact
            chunk, label, source = lax.psum((chunk, label, source), how.group)
        return chunk, label, source, place < total, jnp.where(mine, position, len(x))

    def body(i: Array, carry: Any) -> Any:
        by_source, d_kernel, d_x, (chunk, label, source, valid, position) = carry
        following = gather_chunk(i + 1)  # sent while this chunk is computed
        losses, d_logits = _losses(_logits(kernel, chunk), label, valid, how.vocab)
        by_source += sum_by_source(losses, source, len(by_source))
        d_logits = (source_weights[source][:, None] * d_logits).astype(chunk.dtype)
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
            d_x = d_x.at[position].set(d_chunk.astype(d_x.dtype), mode="drop", unique_indices=True)
        return by_source, d_kernel, d_x, following

    carry = (
        jnp.zeros_like(source_weights),
        jnp.zeros(kernel.shape, jnp.float32) if needed[0] else None,
        jnp.zeros_like(x) if needed[1] else None,
        gather_chunk(jnp.int32(0)),
    )
    by_source, d_kernel, d_x, _ = lax.fori_loop(0, steps, body, carry)
    if how.data:
        by_source = lax.psum(by_source, how.data)
        d_kernel = None if d_kernel is None else lax.psum(d_kernel, how.data)
    sums = (jnp.sum(source_weights * by_source), by_source)
    return sums, d_kernel, None if d_x is None else d_x.reshape(hidden.shape)


def sum_by_source(
    values: Shaped[Array, "*shape"], source_ids: Int[Array, "*shape"], num_sources: int
) -> Float[Array, " S"]:
    """The sum of each source's values. NaN of one source does not reach the others."""
    is_source = source_ids[..., None] == jnp.arange(num_sources)
    each = jnp.where(is_source, values[..., None].astype(jnp.float32), 0)
    return jnp.sum(each, axis=tuple(range(values.ndim)))


def _queue(count: Array, group: str | None) -> tuple[Array, Array]:
    """The place of this device's first target in the queue of its group, and the queue's length."""
    if not group:
        return jnp.int32(0), count
    counts = lax.all_gather(count, group)
    before = jnp.arange(len(counts)) < lax.axis_index(group)
    return jnp.sum(jnp.where(before, counts, 0)), jnp.sum(counts)


def _logits(kernel: Array, x: Array) -> Array:
    """`Llama.logits` of this device's part of the vocabulary, never rounded to bfloat16."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _losses(
    logits: Float[Array, "G V"],
    labels: Int[Array, " G"],
    valid: Bool[Array, " G"],
    axes: tuple[str, ...],
) -> tuple[Float[Array, " G"], Float[Array, "G V"]]:
    """Losses of the valid positions, 0 elsewhere, and their gradients with respect to the logits.

    Args:
      logits: of this device's part of the vocabulary.
      axes: mesh axes over which the vocabulary is split.
    """
    width = logits.shape[1]
    top = jnp.max(logits, axis=1)
    local = labels
    if axes:
        top = lax.pmax(top, axes)
        local = labels - lax.axis_index(axes) * width
    inside = (local >= 0) & (local < width)
    spread = jnp.exp(logits - top[:, None])
    at_label = jnp.take_along_axis(logits, jnp.clip(local, 0, width - 1)[:, None], axis=1)[:, 0]
    norm, at_label = jnp.sum(spread, axis=1), jnp.where(inside, at_label, 0)
    if axes:
        norm, at_label = lax.psum((norm, at_label), axes)
    losses = jnp.where(valid, top + jnp.log(norm) - at_label, 0)
    one_hot = (jnp.arange(width) == local[:, None]).astype(jnp.float32)
    return losses, jnp.where(valid[:, None], spread / norm[:, None] - one_hot, 0)


def head_positions(
    vocab_size: int, rows: int, length: int, chunk: int, targets: int
) -> tuple[int, int]:
    """(Positions that the head processes, iterations of its loop) on the current mesh, where every
    group has an equal share of `targets`."""
    how = split(vocab_size, rows, length, chunk)
    passes = math.ceil(targets / how.groups / how.size)
    return passes * how.size * how.groups, passes
