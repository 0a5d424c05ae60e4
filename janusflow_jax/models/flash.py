"""Flash attention of packed rows on GPUs: causal, in segments, without a T x T array.

Source: FlashAttention-2 (arXiv 2307.08691), here in Pallas, which compiles it with Triton. A block
of queries visits only the blocks of keys that may hold its samples, so a row costs about as much as
its samples would alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from janusflow_jax.models import splash
from janusflow_jax.parallel import sharding

WIDE, NARROW = 128, 64
"""Positions in a block of the side that a program owns, and of the side that it loops over.

With heads of 256 bytes, the kernels fit into the registers and the shared memory of GPUs of compute
capability 8.0 to 12.0 (99 KiB on 8.9 and 12.0). Larger heads have smaller blocks.
"""
COMPILER = triton.CompilerParams(num_warps=8, num_stages=2)
MASKED = -1e30
_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention to the earlier positions of one's segment; softmax in float32.

    Args:
      q, k, v: rows that `attention.dot_product_attention` has checked.
      segment_ids: positions of no segment have negative ids, each its own.
      interpret: run the kernels as JAX operations, on any platform.
    """
    size = q.shape[3]
    # Blocks are powers of two, of at least 16.
    pad = max(16, pl.next_power_of_2(size)) - size
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    run = functools.partial(_attention, scale=size**-0.5, interpret=interpret)
    if sharding.current_mesh() is None:
        return run(q, k, v, segment_ids)[..., :size]
    # XLA does not partition the kernels, so on a mesh they run inside `shard_map`.
    heads_axis = "tensor" if k.shape[2] % sharding.axis_size("tensor") == 0 else None
    spec, row = P(sharding.BATCH, None, heads_axis, None), P(sharding.BATCH, None)
    run = jax.shard_map(run, in_specs=(spec, spec, spec, row), out_specs=spec, check_vma=False)
    return run(q, k, v, segment_ids)[..., :size]


def runs_here() -> bool:
    """False on GPUs before Ampere (compute capability 8.0), for which Triton compiles no matmul."""
    device = jax.local_devices()[0]
    return device.platform != "gpu" or not device.compute_capability.startswith("7.")


def _blocks(x: Array) -> tuple[int, int]:
    """Positions in the block of a program and in those it loops over, for heads of this size."""
    shrink = max(1, x.shape[-1] * x.dtype.itemsize // 256)
    return WIDE // shrink, NARROW // shrink


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, ids: Array, scale: float, interpret: bool) -> Array:
    return _forward(q, k, v, ids, scale, interpret)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array, scale: float, interpret: bool) -> Any:
    rows, length, heads, size = q.shape
    block_q, block_k = _blocks(q)
    first, _ = splash.block_ranges(ids, block_q, block_k)
    group = heads // k.shape[2]
    of_block = pl.BlockSpec((None, block_q, None, size), lambda i, n, b: (b, i, n, 0))
    of_keys = pl.BlockSpec((None, length, None, size), lambda i, n, b: (b, 0, n // group, 0))
    of_row = lambda x: pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (b, 0))  # noqa: E731
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale * math.log2(math.e), block_k=block_k),
        grid=(length // block_q, heads, rows),
        in_specs=[of_block, of_keys, of_keys, of_row(ids), of_row(first)],
        out_specs=[of_block, pl.BlockSpec((None, None, block_q), lambda i, n, b: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        compiler_params=COMPILER,
        interpret=interpret,
        name="flash_forward",
    )(q, k, v, ids, first)
    out, lse = (checkpoint_name(x, "context") for x in (out, lse))
    return out, (q, k, v, ids, out, lse)


def _mask(ids_q: Array, ids_k: Array, q_start: Any, k_start: Any) -> Bool[Array, "T S"]:
    at_q, at_k = q_start + jnp.arange(len(ids_q)), k_start + jnp.arange(len(ids_k))
    return (ids_q[:, None] == ids_k[None]) & (at_q[:, None] >= at_k[None])


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids_ref: Any,
    first_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    block_k: int,
) -> None:
    i, block_q = pl.program_id(0), q_ref.shape[0]
    q = q_ref[...]
    ids_q = ids_ref[pl.ds(i * block_q, block_q)]

    def body(j: Any, carry: Any) -> Any:
        acc, top, total = carry
        keys = pl.ds(j * block_k, block_k)
        scores = _dot(q, k_ref[keys, :].T) * scale
        mask = _mask(ids_q, ids_ref[keys], i * block_q, j * block_k)
        scores = jnp.where(mask, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        acc = acc * shrink[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return acc, new_top, total * shrink + jnp.sum(weights, axis=1)

    start = (
        jnp.zeros(q_ref.shape, jnp.float32),
        jnp.full(block_q, -jnp.inf, jnp.float32),
        jnp.zeros(block_q, jnp.float32),
    )
    # A query that sees none of the first keys counts them all; its own key makes that zero.
    end = pl.cdiv((i + 1) * block_q, block_k)
    acc, top, total = lax.fori_loop(first_ref[i], end, body, start)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _backward(scale: float, interpret: bool, saved: Any, d_out: Array) -> Any:
    q, k, v, ids, out, lse = saved
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    of_row = lambda x: pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (b, 0))  # noqa: E731

    block_q, block_k = _blocks(q)
    first, last = splash.block_ranges(ids, block_q, block_k)
    of_block = pl.BlockSpec((None, block_q, None, size), lambda i, n, b: (b, i, n, 0))
    of_keys = pl.BlockSpec((None, length, None, size), lambda i, n, b: (b, 0, n // group, 0))
    of_queries = pl.BlockSpec((None, None, block_q), lambda i, n, b: (b, n, i))
    d_q = pl.pallas_call(
        functools.partial(_queries_kernel, scale=scale, block_k=block_k),
        grid=(length // block_q, heads, rows),
        in_specs=[
            *(of_block, of_keys, of_keys, of_row(ids), of_row(first)),
            *(of_block, of_queries, of_queries),
        ],
        out_specs=of_block,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=COMPILER,
        interpret=interpret,
        name="flash_queries",
    )(q, k, v, ids, first, d_out, lse, delta)

    block_k, block_q = _blocks(k)
    of_heads = pl.BlockSpec((None, length, group, size), lambda j, n, b: (b, 0, n, 0))
    of_block = pl.BlockSpec((None, block_k, None, size), lambda j, n, b: (b, j, n, 0))
    of_queries = pl.BlockSpec((None, group, length), lambda j, n, b: (b, n, 0))
    d_k, d_v = pl.pallas_call(
        functools.partial(_keys_kernel, scale=scale, block_q=block_q),
        grid=(length // block_k, kv_heads, rows),
        in_specs=[
            *(of_heads, of_block, of_block, of_row(ids), of_row(last)),
            *(of_heads, of_queries, of_queries),
        ],
        out_specs=[of_block, of_block],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=COMPILER,
        interpret=interpret,
        name="flash_keys",
    )(q, k, v, ids, last, d_out, lse, delta)
    return d_q, d_k, d_v, None


def _queries_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids_ref: Any,
    first_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_q_ref: Any,
    *,
    scale: float,
    block_k: int,
) -> None:
    i, block_q = pl.program_id(0), q_ref.shape[0]
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...], delta_ref[...]
    ids_q = ids_ref[pl.ds(i * block_q, block_q)]

    def body(j: Any, d_q: Any) -> Any:
        keys = pl.ds(j * block_k, block_k)
        k = k_ref[keys, :]
        scores = _dot(q, k.T) * (scale * math.log2(math.e))
        mask = _mask(ids_q, ids_ref[keys], i * block_q, j * block_k)
        weights = jnp.where(mask, jnp.exp2(scores - lse[:, None]), 0)
        d_scores = weights * (_dot(d_out, v_ref[keys, :].T) - delta[:, None])
        return d_q + _dot(d_scores.astype(k.dtype), k)

    end = pl.cdiv((i + 1) * block_q, block_k)
    d_q = lax.fori_loop(first_ref[i], end, body, jnp.zeros(q_ref.shape, jnp.float32))
    d_q_ref[...] = (d_q * scale).astype(d_q_ref.dtype)


def _keys_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids_ref: Any,
    last_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
    *,
    scale: float,
    block_q: int,
) -> None:
    j, block_k = pl.program_id(0), k_ref.shape[0]
    k, v = k_ref[...], v_ref[...]
    ids_k = ids_ref[pl.ds(j * block_k, block_k)]

    def head(n: Any, carry: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            d_k, d_v = carry
            queries = pl.ds(i * block_q, block_q)
            q, d_out = q_ref[queries, n, :], d_out_ref[queries, n, :]
            # Keys by queries, so that no block has to be transposed.
            scores = _dot(k, q.T) * (scale * math.log2(math.e))
            mask = _mask(ids_ref[queries], ids_k, i * block_q, j * block_k).T
            weights = jnp.where(mask, jnp.exp2(scores - lse_ref[n, queries]), 0)
            d_scores = weights * (_dot(v, d_out.T) - delta_ref[n, queries])
            d_k = d_k + _dot(d_scores.astype(q.dtype), q)
            return d_k, d_v + _dot(weights.astype(d_out.dtype), d_out)

        return lax.fori_loop(j * block_k // block_q, last_ref[j], body, carry)

    zeros = jnp.zeros(k_ref.shape, jnp.float32)
    d_k, d_v = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    d_k_ref[...] = (d_k * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


_attention.defvjp(_forward, _backward)
