"""Small layers shared by the model parts: linear, norms, rotary positions, attention.

Parameters are float32 and cast to the activations' type where they are used; norms, softmax and
rotary angles are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Int8

from janusflow_jax.models import blocks, quantize, splash
from janusflow_jax.parallel import sharding

Init = Callable[..., Any]


def linear_init(scale: float = 1.0) -> Init:
    """Truncated normal with variance scale / fan_in."""
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


class Linear(nn.Module):
    """`x @ kernel (+ bias)` on the last axis."""

    features: int
    use_bias: bool = True
    kernel_init: Init = linear_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        # Matmuls on flattened tokens are twice as fast on CPU; a split batch keeps its axes.
        lead = x.shape[:-1]
        y = x.reshape(-1, x.shape[-1]) if sharding.num_devices() == 1 else x
        x, y = y, quantize.matmul(y, kernel)
        if self.has_variable("params", "lora_a"):
            names = ("lora_a", "lora_b", "lora_scale")
            a, b, scale = (self.get_variable("params", n).astype(x.dtype) for n in names)
            y = y + (x @ a) @ b * scale
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y.reshape(*lead, self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside, cast back, then times the weight."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with the two-pass variance (the fast one loses digits, FEASIBILITY 9)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exact (erf) GELU; jax.nn's default is the tanh form."""
    return jax.nn.gelu(x, approximate=False)


def safe_norm(
    x: Float[Array, "..."], axis: int | tuple[int, ...], keepdims: bool = True
) -> Float[Array, "..."]:
    """L2 norm whose gradient at zero is 0 (as torch's), where jnp's is NaN."""
    square = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotary positions, half-split form (pairs are i and i + H/2), angles in float32."""
    half = x.shape[-1] // 2
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * freq  # [B, T, H/2]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Causal mask inside each segment; positions of segment 0 see only segment 0."""
    size = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((size, size), bool))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def make_mask(
    segment_ids: Int[Array, "B T"], impl: str
) -> Bool[Array, "B T T"] | Int[Array, "B T"]:
    """What `attention` takes to keep whole rows causal inside segments: built once a step."""
    by_ids = impl == "blocks" or impl.startswith("splash")
    return segment_ids if by_ids else segment_mask(segment_ids)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    v: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | Int[Array, "B T"] | None = None,
    impl: str = "xla",
    scales: tuple[Float[Array, "B S K 1"], Float[Array, "B S K 1"]] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped heads; softmax in float32.

    Args:
      mask: True where a query may look; every query must see something. None: all. For blocks
        and splash, whole rows' segment ids (`make_mask`); for other calls these are 'xla'.
      impl: 'xla' anywhere; 'cudnn' on NVIDIA GPUs in bfloat16; for whole rows 'blocks' on CPU and
        'splash' on TPU (DESIGN section 3), 'splash_interpret' for its tests.
      scales: of keys and values that are int8 (`quantize.keys_values`); 'xla' only.
    """
    heads, size = q.shape[2], q.shape[3]
    if scales is not None and impl != "xla":
        k, v = ((x * scale).astype(q.dtype) for x, scale in zip((k, v), scales, strict=True))
        scales = None
    if impl == "cudnn":
        return _cudnn_attention(q, k, v, mask)
    if k.shape[2] != heads:
        k = jnp.repeat(k, heads // k.shape[2], axis=2)
        v = jnp.repeat(v, heads // v.shape[2], axis=2)
        if scales is not None:
            k_scale, v_scale = (jnp.repeat(s, heads // s.shape[2], axis=2) for s in scales)
            scales = k_scale, v_scale
    if mask is not None and mask.ndim == 2:
        if impl == "blocks":
            return blocks.attention(q, k, v, mask)
        return splash.attention(q, k, v, mask, interpret=impl == "splash_interpret")
    # Heads beside the batch first: on CPU forward and backward are 3.5 times as fast so.
    q, k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (q * size**-0.5, k, v))
    scores = jnp.einsum("BNTH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32)
    k_scale, v_scale = (s.transpose(0, 2, 3, 1) for s in scales) if scales else (None, None)
    if k_scale is not None:
        scores = scores * k_scale
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    if v_scale is not None:
        weights = weights * v_scale
    weights = weights.astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("BNTS,BNSH->BNTH", weights, v), 1, 2)


def _cudnn_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """cuDNN's fused kernel; it takes no odd lengths, so queries and keys are padded to even."""
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
    return out[:, : lengths[0]]
