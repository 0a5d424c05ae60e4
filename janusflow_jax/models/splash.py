"""Causal attention inside segments by splash attention, JAX's own Pallas kernel for TPU.

Memory grows with T instead of T x T, and blocks that cross samples are skipped (PROTOTYPES
section 3). Mosaic kernels are not partitioned by XLA, so on a mesh it runs inside `shard_map`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from janusflow_jax.parallel import sharding

BLOCK = 512
"""Positions of a block of queries or keys; shorter rows use their own length."""
UNIT = 128
"""The kernel takes multiples of this many positions."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Each position sees the earlier ones of its segment; softmax in float32.

    Args:
      interpret: run the kernel's definition with XLA, for tests where there is no TPU.
    Raises:
      ValueError: T is no multiple of UNIT, or rows do not divide over the mesh.
    """
    rows, length, heads, size = q.shape
    if length % UNIT:
        raise ValueError(
            f"splash attention: expected rows of a multiple of {UNIT} positions; got {length}: "
            "change data.row_len, or use --config.attention=xla"
        )
    q = q * size**-0.5
    if sharding.current_mesh() is None:
        return _local(q, k, v, segment_ids, interpret)
    if rows % sharding.batch_size():
        raise ValueError(
            f"splash attention: expected rows that divide over {sharding.batch_size()} devices "
            f"(data x fsdp); got {rows}"
        )
    split = "tensor" if heads % sharding.axis_size("tensor") == 0 else None
    spec, ids = P(sharding.BATCH, None, split, None), P(sharding.BATCH, None)
    run = functools.partial(_local, interpret=interpret)
    return jax.shard_map(run, in_specs=(spec, spec, spec, ids), out_specs=spec, check_vma=False)(
        q, k, v, segment_ids
    )


def _local(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = _kernel(q.shape[1], q.shape[2], interpret)

    def row(q: Array, k: Array, v: Array, ids: Array) -> Array:
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, segment_ids).swapaxes(1, 2)


def _kernel(length: int, heads: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask as masks,
    )

    block = BLOCK if length % BLOCK == 0 else UNIT
    return kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
