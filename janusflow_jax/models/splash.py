"""Sparse flash attention of packed rows on TPUs: causal, in segments, without a T x T array.

Source: FlashAttention-2 (arXiv 2307.08691), here in Pallas, which compiles it with Mosaic. A block
of queries visits only the blocks of keys that may hold its samples. A core's own memory
holds the keys and values of a whole row; in the backward pass it holds the queries instead. One
backward kernel computes all three gradients from the same weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from janusflow_jax.config.errors import ConfigError
from janusflow_jax.parallel import sharding

BLOCK = 512
"""Positions in a block of queries or keys, where they divide a row."""
UNIT = 128
"""Rows have a multiple of this many positions."""
MASKED = -1e30
BLOCK_MEMORY = 4 * 2**20
"""Bytes of a core's own memory for what does not grow with the row."""


def block_size(length: int) -> int:
    """Positions in a block for rows of a length: 512, 256 or 128."""
    return math.gcd(length, BLOCK)


def _position_memory(size: int, dtype: Any) -> int:
    """Bytes of a core's own memory for each position of a row: 12 vectors of a head. Compiled
    kernels needed up to 10."""
    return 12 * pl.cdiv(size, UNIT) * UNIT * jnp.dtype(dtype).itemsize


def check_row(length: int, size: int, dtype: Any) -> None:
    """Checks that a core of the current TPU can hold a row of a head.

    Args:
      length: positions of a row.
      size, dtype: of a head.
    Raises:
      ConfigError: they cannot.
    """
    memory = pltpu.get_tpu_info().vmem_capacity_bytes
    longest = (memory - BLOCK_MEMORY) // _position_memory(size, dtype) // UNIT * UNIT
    if length > longest:
        raise ConfigError(
            f"data.row_len: expected at most {longest} positions for splash attention in {dtype}, "
            f"which keeps a row in the {memory >> 20} MiB of a TPU core's own memory; got {length}:"
            " make rows shorter, or set attention to xla"
        )


def executed_blocks(segment_ids: Any, block: int) -> Any:
    """The pairs of blocks in which a query may see a key.

    These are the blocks on the diagonal, and those below it whose segments overlap. Positions of no
    segment (padding and dropped prompts; 0 or less) count on the diagonal only.

    Args:
      segment_ids: int[B, T], a numpy or a jax array; segments stand in rising order.
      block: positions in a block; it divides T.
    Returns:
      bool[B, Q, S], of the same library: query block, key block.
    """
    rows, length = segment_ids.shape
    ids = segment_ids.reshape(rows, length // block, block)
    first = ids.min(2, where=ids > 0, initial=np.iinfo(np.int32).max)
    last = ids.max(2)
    overlap = (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])
    blocks = length // block
    return overlap & np.tri(blocks, dtype=bool) | np.eye(blocks, dtype=bool)


def block_ranges(
    ids: Int[Array, "B T"], wide: int, narrow: int
) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
    """The first narrow block of keys for each wide block of queries; the end of the narrow blocks
    of queries for each wide block of keys."""
    meet = executed_blocks(ids, narrow)
    rows, blocks, _ = meet.shape
    by_queries = meet.reshape(rows, -1, wide // narrow, blocks).any(2)
    by_keys = meet.reshape(rows, blocks, -1, wide // narrow).any(3)
    return jnp.argmax(by_queries, axis=2), blocks - jnp.argmax(by_keys[:, ::-1], axis=1)


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Causal attention inside segments; softmax in float32; memory grows with T, not T x T.

    Args:
      q, k, v: rows that `attention.dot_product_attention` has checked.
      segment_ids: positions of no segment have negative ids, each its own.
      interpret: run the kernels without a TPU.
    """
    run = functools.partial(_attention, interpret=interpret)
    if sharding.current_mesh() is None:
        return run(q, k, v, segment_ids)
    # XLA does not partition Mosaic kernels, so on a mesh they run inside `shard_map`.
    heads_axis = None if k.shape[1] % sharding.axis_size("tensor") else "tensor"
    spec, ids = P(sharding.BATCH, heads_axis), P(sharding.BATCH)
    return jax.shard_map(run, in_specs=(spec, spec, spec, ids), out_specs=spec, check_vma=False)(
        q, k, v, segment_ids
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, ids: Array, interpret: bool) -> Array:
    return _forward(q, k, v, ids, interpret)[0]


def _forward(q: Array, k: Array, v: Array, ids: Array, interpret: bool) -> Any:
    rows, heads, length, size = q.shape
    group, block = heads // k.shape[1], block_size(length)
    first, _ = block_ranges(ids, block, block)
    of_queries = pl.BlockSpec((None, None, block, size), lambda b, n, i, _: (b, n, i, 0))
    of_keys = pl.BlockSpec((None, None, length, size), lambda b, n, i, _: (b, n // group, 0, 0))
    out, lse = pl.pallas_call(
        _forward_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, length // block),
            in_specs=[
                *(of_queries, of_keys, of_keys),
                pl.BlockSpec((None, block, UNIT), lambda b, n, i, _: (b, i, 0)),
                pl.BlockSpec((None, length // block, 1, block), lambda b, n, i, _: (b, 0, 0, 0)),
            ],
            out_specs=[
                of_queries,
                pl.BlockSpec((None, None, None, 1, block), lambda b, n, i, _: (b, n, i, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((block, size), jnp.float32),
                pltpu.VMEM((block, UNIT), jnp.float32),
                pltpu.VMEM((block, UNIT), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, length // block, 1, block), jnp.float32),
        ],
        compiler_params=_compiler_params(q),
        interpret=interpret,
        name="splash_forward",
    )(first.astype(jnp.int32), q, k, v, *_along_both_axes(ids, block))
    out, lse = (checkpoint_name(x, "context") for x in (out, lse))
    return out, (q, k, v, ids, out, lse)


def _compiler_params(q: Array) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),  # rows, heads, blocks
        vmem_limit_bytes=BLOCK_MEMORY + q.shape[2] * _position_memory(q.shape[3], q.dtype),
    )


def _along_both_axes(
    ids: Int[Array, "B T"], block: int
) -> tuple[Int[Array, "B T UNIT"], Int[Array, "B blocks 1 block"]]:
    """The segments down the sublanes, the same in all lanes, and along the lanes."""
    return jnp.broadcast_to(ids[..., None], (*ids.shape, UNIT)), ids.reshape(len(ids), -1, 1, block)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """A matmul that sums over an axis of each factor, in float32."""
    dimensions = ((axes[:1], axes[1:]), ((), ()))
    # Mosaic takes no other precision, and "highest" for float32 only.
    asked = getattr(jax.config, "jax_default_matmul_precision", None)
    exact = a.dtype == jnp.float32 and asked == "highest"
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _lanes(x: Array, size: int) -> Array:
    """What is the same in all lanes, [T, UNIT] -> [T, size]."""
    return jnp.tile(x, (1, pl.cdiv(size, UNIT)))[:, :size]


def _scores(q: Array, k: Array, axis: int, offset: Any, same_segment: Array) -> Array:
    """Scores of a block of queries and a block of keys, for powers of 2.

    Args:
      axis: the one along which the keys stand.
      offset: the start of the queries minus the start of the keys, in positions.
    """
    scores = _dot(*((k, q) if axis == 0 else (q, k)), (1, 1))
    scores = scores * (q.shape[1] ** -0.5 * math.log2(math.e))
    at_key, at_query = (lax.broadcasted_iota(jnp.int32, scores.shape, n) for n in (axis, 1 - axis))
    return jnp.where(same_segment & (at_key - at_query <= offset), scores, MASKED)


def _forward_kernel(
    first_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids_q_ref: Any,
    ids_k_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    acc_ref: Any,
    top_ref: Any,
    total_ref: Any,
) -> None:
    row, i, (block, size) = pl.program_id(0), pl.program_id(2), q_ref.shape
    acc_ref[...] = jnp.zeros_like(acc_ref)
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)

    def body(j: Any, _: None) -> None:
        keys = pl.ds(j * block, block)
        same_segment = _lanes(ids_q_ref[...], block) == ids_k_ref[j]
        scores = _scores(q_ref[...], k_ref[keys, :], 1, (i - j) * block, same_segment)
        top = top_ref[...]
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - _lanes(new_top, block))
        shrink = jnp.exp2(top - new_top)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        out = _dot(weights.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
        acc_ref[...] = acc_ref[...] * _lanes(shrink, size) + out

    # A query that sees none of the first keys counts them all; its own key makes that zero.
    lax.fori_loop(first_ref[row, i], i + 1, body, None)
    out_ref[...] = (acc_ref[...] / _lanes(total_ref[...], size)).astype(out_ref.dtype)
    lse_ref[...] = (top_ref[...] + jnp.log2(total_ref[...])).T[:1]


def _backward(interpret: bool, saved: Any, d_out: Array) -> Any:
    q, k, v, ids, out, lse = saved
    rows, heads, length, size = q.shape
    group, block = heads // k.shape[1], block_size(length)
    _, end = block_ranges(ids, block, block)
    of_queries = pl.BlockSpec((None, None, length, size), lambda b, n, j, _: (b, n, 0, 0))
    of_keys = pl.BlockSpec((None, None, block, size), lambda b, n, j, _: (b, n // group, j, 0))
    of_key_gradients = pl.BlockSpec((None, None, block, size), lambda b, n, j, _: (b, n, j, 0))
    along_lanes = (length // block, 1, block)
    d_q, d_k, d_v = pl.pallas_call(
        _backward_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, length // block),
            in_specs=[
                *(of_queries, of_keys, of_keys),
                pl.BlockSpec((None, block, UNIT), lambda b, n, j, _: (b, j, 0)),
                pl.BlockSpec((None, *along_lanes), lambda b, n, j, _: (b, 0, 0, 0)),
                *(of_queries, of_queries),
                pl.BlockSpec((None, None, *along_lanes), lambda b, n, j, _: (b, n, 0, 0, 0)),
            ],
            out_specs=[of_queries, of_key_gradients, of_key_gradients],
            scratch_shapes=[
                pltpu.VMEM((length, size), jnp.float32),
                pltpu.VMEM((block, size), jnp.float32),
                pltpu.VMEM((block, size), jnp.float32),
                pltpu.VMEM(along_lanes, jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, x.dtype) for x in (q, k, v)],
        compiler_params=_compiler_params(q),
        interpret=interpret,
        name="splash_backward",
    )(end.astype(jnp.int32), q, k, v, *_along_both_axes(ids, block), out, d_out, lse)
    d_k, d_v = (x.reshape(rows, -1, group, length, size).sum(2) for x in (d_k, d_v))
    return d_q, d_k, d_v, None


def _backward_kernel(
    end_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids_k_ref: Any,
    ids_q_ref: Any,
    out_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    d_q_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
    d_q_sum: Any,
    d_k_sum: Any,
    d_v_sum: Any,
    delta_ref: Any,
) -> None:
    row, j, (block, size) = pl.program_id(0), pl.program_id(2), k_ref.shape
    scale = size**-0.5
    blocks = len(delta_ref)

    # The blocks of keys of a head run in order on one core, so that the sum of d_q and delta last
    # from the first to the last.
    @pl.when(j == 0)
    def start_of_row() -> None:
        d_q_sum[...] = jnp.zeros_like(d_q_sum)

        def body(i: Any, _: None) -> None:
            queries = pl.ds(i * block, block)
            product = out_ref[queries, :].astype(jnp.float32) * d_out_ref[queries, :]
            delta_ref[i] = jnp.sum(product.T, axis=0, keepdims=True)

        lax.fori_loop(0, blocks, body, None)

    d_k_sum[...] = jnp.zeros_like(d_k_sum)
    d_v_sum[...] = jnp.zeros_like(d_v_sum)

    def body(i: Any, _: None) -> None:
        queries = pl.ds(i * block, block)
        q, d_out = q_ref[queries, :], d_out_ref[queries, :]
        same_segment = _lanes(ids_k_ref[...], block) == ids_q_ref[i]
        scores = _scores(q, k_ref[...], 0, (i - j) * block, same_segment)
        weights = jnp.exp2(scores - lse_ref[i])
        d_v_sum[...] += _dot(weights.astype(d_out.dtype), d_out, (1, 0))
        d_scores = weights * (_dot(v_ref[...], d_out, (1, 1)) - delta_ref[i])
        d_scores = d_scores.astype(q.dtype)
        d_k_sum[...] += _dot(d_scores, q, (1, 0))
        d_q_sum[queries, :] += _dot(d_scores, k_ref[...], (0, 0))

    lax.fori_loop(j, end_ref[row, j], body, None)
    d_k_ref[...] = (d_k_sum[...] * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v_sum[...].astype(d_v_ref.dtype)

    @pl.when(j == blocks - 1)
    def end_of_row() -> None:
        d_q_ref[...] = (d_q_sum[...] * scale).astype(d_q_ref.dtype)


_attention.defvjp(_forward, _backward)
