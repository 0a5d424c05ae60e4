"""Causal attention inside segments, a block of queries at a time, for whole rows on a CPU.

A block sees the keys up to its own end only, so half of all pairs are never computed, and its
scores stay in the processor's cache. The backward pass computes them again from the rows' log-sums
(Dao et al., arXiv 2205.14135, without its inner loop over keys). XLA's own form writes and reads
[N, T, T] several times a layer, which at 2,048 positions is most of a training step here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERIES = 128
"""Queries of a block: measured, see benchmarks/RESULTS.md."""

_HIDDEN = -1e30  # a score that is not seen; its exponential is 0


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention; softmax in float32."""
    # Heads beside the batch first, as in layers.attention.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(_attend(q, k, v, segment_ids), 1, 2)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, QUERIES):
        yield begin, min(begin + QUERIES, length)


def _seen(segment_ids: Array, begin: int, end: int) -> Bool[Array, "B 1 Q S"]:
    causal = jnp.arange(begin, end)[:, None] >= jnp.arange(end)
    same = segment_ids[:, begin:end, None] == segment_ids[:, None, :end]
    return (causal & same)[:, None]


def _scores(q: Array, k: Array, segment_ids: Array, begin: int, end: int) -> Array:
    scores = jnp.einsum(
        "BNQH,BNSH->BNQS", q[:, :, begin:end], k[:, :, :end], preferred_element_type=jnp.float32
    )
    return jnp.where(_seen(segment_ids, begin, end), scores, _HIDDEN)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    return _forward(q, k, v, segment_ids)[0]


def _forward(q: Array, k: Array, v: Array, segment_ids: Array) -> tuple[Array, tuple]:
    outs, sums = [], []
    for begin, end in _blocks(q.shape[2]):
        scores = _scores(q, k, segment_ids, begin, end)
        top = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, -1, keepdims=True)
        out = jnp.einsum("BNQS,BNSH->BNQH", weights.astype(v.dtype), v[:, :, :end])
        outs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out, log_sums = jnp.concatenate(outs, 2), jnp.concatenate(sums, 2)
    return out, (q, k, v, segment_ids, out, log_sums)


def _backward(saved: tuple, d_out: Array) -> tuple:
    q, k, v, segment_ids, out, log_sums = saved
    length = q.shape[2]
    inner = jnp.sum((d_out * out).astype(jnp.float32), -1, keepdims=True)
    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for begin, end in _blocks(length):
        here = slice(begin, end)
        scores = _scores(q, k, segment_ids, begin, end)
        weights = jnp.exp(scores - log_sums[:, :, here])
        d_block = d_out[:, :, here]
        d_weights = einsum("BNQH,BNSH->BNQS", d_block, v[:, :, :end])
        d_scores = (weights * (d_weights - inner[:, :, here])).astype(q.dtype)
        d_qs.append(einsum("BNQS,BNSH->BNQH", d_scores, k[:, :, :end]))
        d_k = d_k.at[:, :, :end].add(einsum("BNQS,BNQH->BNSH", d_scores, q[:, :, here]))
        d_v = d_v.at[:, :, :end].add(einsum("BNQS,BNQH->BNSH", weights.astype(v.dtype), d_block))
    d_q = jnp.concatenate(d_qs, 2)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
