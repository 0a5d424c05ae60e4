"""Splash attention: JAX's Pallas kernel for TPUs, on packed rows.

The kernel visits the blocks of queries and keys that a mask names. JAX's own masks are the same for
all rows, so every row would compute all blocks below the diagonal. Here the mask comes from each
row's segments. The rows of a device stand one after another in one long sequence, because the
kernel has one mask.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from janusflow_jax.parallel import sharding

BLOCK = 512
"""Positions in a block of queries or keys, where they divide a row."""
UNIT = 128
"""Rows have a multiple of this many positions."""


def block_size(length: int) -> int:
    """Positions in a block for rows of a length: 512, 256 or 128."""
    return math.gcd(length, BLOCK)


def executed_blocks(segment_ids: Any, block: int) -> Any:
    """The pairs of blocks that the kernel computes.

    These are the blocks on the diagonal, and those below it whose segments overlap. Positions of
    segment 0 (padding and dropped prompts) count on the diagonal only.

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


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Causal attention inside segments; memory grows with T, not T x T.

    A position of segment 0 attends to itself and to some others of segment 0.

    Args:
      q, k, v: rows that `attention.dot_product_attention` has checked.
      interpret: run the kernel without a TPU.
    """
    heads = q.shape[1]
    q = q * q.shape[-1] ** -0.5

    def run(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        return _on_device(q, k, v, segment_ids, interpret)

    if sharding.current_mesh() is None:
        return run(q, k, v, segment_ids)
    # XLA does not partition Mosaic kernels, so on a mesh the kernel runs inside `shard_map`.
    heads_axis = None if math.gcd(heads, k.shape[1]) % sharding.axis_size("tensor") else "tensor"
    spec, ids = P(sharding.BATCH, heads_axis), P(sharding.BATCH)
    return jax.shard_map(run, in_specs=(spec, spec, spec, ids), out_specs=spec, check_vma=False)(
        q, k, v, segment_ids
    )


def _on_device(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask as masks,
    )

    rows, heads, length, _ = q.shape
    block = block_size(length)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        # The fused backward kernel writes a dq for each block of keys, which costs more than it
        # saves where most blocks are skipped.
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name="context",
        interpret=interpret,
    )
    for_queries, for_keys = _blocks_to_visit(executed_blocks(segment_ids, block))
    order = jnp.arange(rows * length, dtype=jnp.int32)
    replace = lambda info, blocks: info._replace(**blocks, q_sequence=order)  # noqa: E731
    kernel.fwd_mask_info = replace(kernel.fwd_mask_info, for_queries)
    kernel.dq_mask_info = replace(kernel.dq_mask_info, for_queries)
    kernel.dkv_mask_info = replace(kernel.dkv_mask_info, for_keys)

    def one_sequence(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], rows * length, -1)

    ids = segment_ids.reshape(-1)
    q, k, v = (one_sequence(x) for x in (q, k, v))
    out: Any = kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))
    return out.reshape(heads, rows, length, -1).swapaxes(0, 1)


def _blocks_to_visit(
    executed: Bool[Array, "B Q S"],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """`block_mask` and `data_next` of the kernel's grids, which visit the blocks of one row only.

    `data_next` is the block to load, counted over all rows. Where no block is computed it is the
    nearest one that is, so that nothing is loaded in vain.

    Returns:
      for each query block, its key blocks [1, B x Q, S]; for each key block, its query blocks
      [1, Q, B x S].
    """
    rows, blocks, _ = executed.shape
    query, key = jnp.arange(blocks)[:, None], jnp.arange(blocks)
    first_key = jnp.argmax(executed, axis=2, keepdims=True)
    last_query = blocks - 1 - jnp.argmax(executed[:, ::-1], axis=1, keepdims=True)
    before = blocks * jnp.arange(rows)[:, None, None]
    by_query = {"block_mask": executed, "data_next": before + jnp.clip(key, first_key, query)}
    by_key = {"block_mask": executed, "data_next": before + jnp.clip(query, key, last_query)}
    return (
        {n: x.reshape(1, -1, blocks).astype(jnp.int32) for n, x in by_query.items()},
        {n: x.swapaxes(0, 1).reshape(1, blocks, -1).astype(jnp.int32) for n, x in by_key.items()},
    )
