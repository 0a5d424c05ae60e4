"""Scaled dot-product attention, in the implementations of `config.ATTENTION`.

`xla` runs anywhere. `splash`, for TPUs, and `flash`, for GPUs, are for whole rows: each position
attends to the earlier ones of its segment.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Int8

from janusflow_jax.config import TrainConfig
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.models import flash, products, splash
from janusflow_jax.parallel import sharding

SAVED_NAMES = ("q", "k", "v", "context", "proj", "gate", "up")
"""The matmul results of an LLM block that `jax.checkpoint` may keep, by `checkpoint_name`.

`context`, the attended values, includes the log-sum-exp of a kernel that has one, so that its
backward pass needs no second forward pass. `proj` is the output projection.
"""


def implementation(name: str, platform: str, length: int) -> str:
    """The implementation for a config's `attention` on 'cpu', 'gpu' or 'tpu', and rows of a length.

    `auto` chooses the platform's kernel for packed rows where it takes their length.
    """
    if name != "auto":
        return name
    if platform == "tpu" and length % splash.UNIT == 0:
        return "splash"
    if platform == "gpu" and length % splash.UNIT == 0 and flash.runs_here():
        return "flash"
    return "xla"


def check_platform(name: str, platform: str) -> None:
    """Raises ConfigError if an implementation does not run on a platform."""
    expected = {"splash": "tpu", "flash": "gpu"}.get(name, platform)
    if platform != expected:
        raise ConfigError(
            f"attention: expected a {expected} for {name}; got a {platform}: set it to auto"
        )


def check_here(cfg: TrainConfig) -> None:
    """Raises ConfigError if the attention of a config does not run on this machine's devices."""
    platform = jax.default_backend()
    check_platform(cfg.attention, platform)
    check_rows(cfg, platform)


def check_rows(cfg: TrainConfig, platform: str) -> None:
    """Raises ConfigError if a kernel does not take rows so long on the current devices."""
    if implementation(cfg.attention, platform, cfg.data.row_len) == "splash":
        splash.check_row(cfg.data.row_len, cfg.model.llm.head_dim, cfg.dtype)


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Causal mask inside each segment; positions of segment 0 attend to segment 0 only."""
    size = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((size, size), bool))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def row_mask(segment_ids: Int[Array, "B T"], impl: str) -> Bool[Array, "B T T"] | Int[Array, "B T"]:
    """The `mask` of `dot_product_attention` for whole rows, built once for all layers."""
    kernel = impl.startswith(("splash", "flash"))
    return segment_ids if kernel else segment_mask(segment_ids)


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
        Segment ids (of `row_mask`) for 'splash' and 'flash'; both run any other mask as 'xla'.
      impl: one of `config.ATTENTION`; '_interpret' after a kernel's name is for tests on CPU.
      scales: of int8 keys and values (`int8.keys_values`).
    Raises:
      ValueError: whole rows that a kernel does not take.
    """
    if scales is not None and impl != "xla":
        k, v = ((x * scale).astype(q.dtype) for x, scale in zip((k, v), scales, strict=True))
        scales = None
    if mask is not None and mask.ndim == 2:
        return _whole_rows(q, k, v, mask, *impl.split("_"))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    # Heads next to the batch: on CPU both passes are 3.5 times as fast in this layout.
    batch, heads, length, size = q.shape
    q = (q * size**-0.5).reshape(batch, k.shape[1], -1, length, size)  # query heads of a key head
    if scales is None and products.rounds(q):
        out = _from_rounded(q, k, v, mask).reshape(batch, heads, length, size)
        return checkpoint_name(jnp.swapaxes(out, 1, 2), "context")
    scores: Any = _float32_product("BKGTH,BKSH->BKGTS", q, k.astype(q.dtype))
    # The scales multiply scores and weights, so that no wide copy of int8 keys and values exists.
    if scales:
        k_scale, v_scale = (x.transpose(0, 2, 3, 1)[:, :, None] for x in scales)
        scores = scores * k_scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    if scales:
        weights = weights * v_scale
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(q.dtype), v.astype(q.dtype))
    out = out.reshape(batch, heads, length, size)
    return checkpoint_name(jnp.swapaxes(out, 1, 2), "context")


def _from_rounded(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention by `products`: scaled q [B, K, G, T, H]; k, v [B, K, S, H] -> [B, K, G * T, H]."""
    scores = products.matmul_transposed(q.reshape(*k.shape[:2], -1, k.shape[-1]), k)
    if mask is not None:
        grouped = scores.reshape(*q.shape[:-1], -1)
        scores = jnp.where(mask[:, None, None], grouped, -1e30).reshape(scores.shape)
    return products.matmul(jax.nn.softmax(scores, axis=-1), v)


def _whole_rows(
    q: Array, k: Array, v: Array, segment_ids: Array, kernel: str, interpret: str = ""
) -> Array:
    """Attention of packed rows by a platform's kernel."""
    rows, length = segment_ids.shape
    if length % splash.UNIT:
        raise ValueError(
            f"{kernel} attention: expected rows of a multiple of {splash.UNIT} positions; got "
            f"{length}: change data.row_len, or set attention to xla"
        )
    if sharding.current_mesh() is not None and rows % sharding.batch_size():
        raise ValueError(
            f"{kernel} attention: expected rows that divide over {sharding.batch_size()} devices "
            f"(data x fsdp); got {rows}"
        )
    # Padding and dropped prompts: each position attends to itself alone. Nothing reads its output.
    segment_ids = jnp.where(segment_ids == 0, -1 - jnp.arange(length), segment_ids)
    if kernel == "flash":
        return flash.attention(q, k, v, segment_ids, interpret=bool(interpret))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = splash.attention(q, k, v, segment_ids, interpret=bool(interpret))
    return jnp.swapaxes(out, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float32_product(spec: str, a: Array, b: Array) -> Array:
    """An einsum with a float32 result whose gradients multiply in the type of `a`.

    JAX's own gradient multiplies the float32 cotangent as it is, which no GPU does at the rate of
    bfloat16.
    """
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _product_forward(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _float32_product(spec, a, b), (a, b)


def _product_backward(spec: str, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    (a, b), (of_a, of_b, of_out) = saved, spec.replace("->", ",").split(",")
    d_out = d_out.astype(a.dtype)
    return (
        jnp.einsum(f"{of_out},{of_b}->{of_a}", d_out, b),
        jnp.einsum(f"{of_out},{of_a}->{of_b}", d_out, a),
    )


_float32_product.defvjp(_product_forward, _product_backward)
