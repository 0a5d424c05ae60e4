"""Scaled dot-product attention, in the implementations of `config.ATTENTION`.

`xla` runs anywhere, `cudnn` is the fused kernel for NVIDIA GPUs. `splash`, for TPUs, is for whole
rows: each position attends to the earlier ones of its segment.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int8

from janusflow_jax.config.errors import ConfigError
from janusflow_jax.parallel import sharding

SPLASH_BLOCK = 512
"""Positions in a block of queries or keys of splash attention, where they divide a row."""
SPLASH_UNIT = 128
"""Splash attention takes rows of a multiple of this many positions."""
SAVED_NAMES = ("q", "k", "v", "context", "proj", "gate", "up")
"""The matmul results of an LLM block that `jax.checkpoint` may keep, by `checkpoint_name`.

`context`, the attended values, includes the log-sum-exp of a kernel that has one, so that its
backward pass needs no second forward pass. `proj` is the output projection.
"""


def implementation(name: str, platform: str, length: int) -> str:
    """The implementation for a config's `attention` on 'cpu', 'gpu' or 'tpu', and rows of a length.

    `auto` chooses what runs: splash attention for rows that it takes. It never chooses cuDNN, which
    takes bfloat16 only.
    """
    if name != "auto":
        return name
    return "splash" if platform == "tpu" and length % SPLASH_UNIT == 0 else "xla"


def check_platform(name: str, platform: str) -> None:
    """Raises ConfigError if an implementation does not run on a platform."""
    expected = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if platform != expected:
        raise ConfigError(
            f"attention: expected a {expected} for {name}; got a {platform}: set it to auto"
        )


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Causal mask inside each segment; positions of segment 0 attend to segment 0 only."""
    size = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((size, size), bool))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def row_mask(segment_ids: Int[Array, "B T"], impl: str) -> Bool[Array, "B T T"] | Int[Array, "B T"]:
    """The `mask` of `dot_product_attention` for whole rows, built once for all layers."""
    return segment_ids if impl.startswith("splash") else segment_mask(segment_ids)


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    v: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | Int[Array, "B T"] | None = None,
    impl: str = "xla",
    scales: tuple[Float[Array, "B S K 1"], Float[Array, "B S K 1"]] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention with grouped heads; softmax in float32.

    Args:
      mask: True where a query attends; each query needs at least one key. None: everywhere.
        Segment ids (of `row_mask`) for 'splash', which with any other mask runs as 'xla'.
      impl: one of `config.ATTENTION`, or 'splash_interpret' for tests without a TPU.
      scales: of int8 keys and values (`int8.keys_values`).
    """
    heads, size = q.shape[2], q.shape[3]
    if scales is not None and impl != "xla":
        k, v = ((x * scale).astype(q.dtype) for x, scale in zip((k, v), scales, strict=True))
        scales = None
    if impl == "cudnn":
        return _cudnn(q, k, v, mask)
    if k.shape[2] != heads:
        repeat = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)  # noqa: E731
        k, v = repeat(k), repeat(v)
        scales = scales and (repeat(scales[0]), repeat(scales[1]))
    if mask is not None and mask.ndim == 2:
        return _splash(q, k, v, mask, interpret=impl == "splash_interpret")
    # Heads next to the batch: on CPU both passes are 3.5 times as fast in this layout.
    q, k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (q * size**-0.5, k, v))
    scores = jnp.einsum("BNTH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32)
    # The scales multiply scores and weights, so that no wide copy of int8 keys and values exists.
    k_scale, v_scale = (s.transpose(0, 2, 3, 1) for s in scales) if scales else (None, None)
    if k_scale is not None:
        scores = scores * k_scale
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    if v_scale is not None:
        weights = weights * v_scale
    weights = weights.astype(v.dtype)
    out = jnp.swapaxes(jnp.einsum("BNTS,BNSH->BNTH", weights, v), 1, 2)
    return checkpoint_name(out, "context")


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    # cuDNN takes even lengths only, so queries and keys are padded.
    lengths = q.shape[1], k.shape[1]
    pad_q, pad_k = lengths[0] % 2, lengths[1] % 2
    if pad_k and mask is None:
        mask = jnp.ones((q.shape[0], *lengths), bool)
    pad = lambda x, n: jnp.pad(x, ((0, 0), (0, n)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, pad_q), (0, pad_k)))[:, None]
    out = jax.nn.dot_product_attention(
        pad(q, pad_q), pad(k, pad_k), pad(v, pad_k), mask=mask, implementation="cudnn"
    )
    return checkpoint_name(out[:, : lengths[0]], "context")


def _splash(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool) -> Array:
    """JAX's Pallas kernel: memory grows with T, not T x T, and blocks across segments are skipped.

    Raises:
      ValueError: T is no multiple of SPLASH_UNIT, or the rows do not divide over the mesh.
    """
    rows, length, heads, size = q.shape
    if length % SPLASH_UNIT:
        raise ValueError(
            f"splash attention: expected rows of a multiple of {SPLASH_UNIT} positions; got "
            f"{length}: change data.row_len, or set attention to xla"
        )
    q = q * size**-0.5
    run = functools.partial(_splash_on_device, interpret=interpret)
    if sharding.current_mesh() is None:
        return run(q, k, v, segment_ids)
    if rows % sharding.batch_size():
        raise ValueError(
            f"splash attention: expected rows that divide over {sharding.batch_size()} devices "
            f"(data x fsdp); got {rows}"
        )
    # XLA does not partition Mosaic kernels, so on a mesh the kernel runs inside `shard_map`.
    heads_axis = "tensor" if heads % sharding.axis_size("tensor") == 0 else None
    spec, ids = P(sharding.BATCH, None, heads_axis, None), P(sharding.BATCH, None)
    return jax.shard_map(run, in_specs=(spec, spec, spec, ids), out_specs=spec, check_vma=False)(
        q, k, v, segment_ids
    )


def _splash_on_device(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask as masks,
    )

    length, heads = q.shape[1:3]
    block = SPLASH_BLOCK if length % SPLASH_BLOCK == 0 else SPLASH_UNIT
    kernel = kernels.make_splash_mha(
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
        residual_checkpoint_name="context",
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, ids: Array) -> Any:
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, segment_ids).swapaxes(1, 2)
