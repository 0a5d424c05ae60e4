"""Layers that several parts share: linear, patch embedding, norms, rotary positions.

Parameters are float32 and are cast to the type of the activations where they are used. Norms and
rotary angles are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from janusflow_jax.config import RopeConfig
from janusflow_jax.models import int8
from janusflow_jax.parallel import sharding

Init = Callable[..., Any]
kernel_init: Init = nn.initializers.lecun_normal()
"""Truncated normal with variance 1 / fan_in, of linears and of convolutions [h, w, C, D]."""


class Linear(nn.Module):
    """`x @ kernel (+ bias)` on the last axis, plus a LoRA adapter where the parameters have one.

    With `heads` the features are divided: [B, T, D] -> [B, T, N, F / N].
    """

    features: int
    use_bias: bool = True
    heads: int = 0
    kernel_init: Init = kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        shape = (self.heads, self.features // self.heads) if self.heads else (self.features,)
        lead = x.shape[:-1]
        # On CPU matmuls of flattened tokens are twice as fast. On a mesh the batch is an axis of
        # its own, or XLA would gather it.
        if sharding.num_devices() == 1:
            x = x.reshape(-1, x.shape[-1])
        elif self.heads and not int8.is_int8(kernel):
            # XLA for TPUs divides the kernel without a copy of the result. On one device it would
            # keep a copy of the kernels of all layers.
            kernel = kernel.reshape(-1, *shape)
        y = int8.matmul(x, kernel)
        if self.has_variable("params", "lora_a"):
            names = ("lora_a", "lora_b", "lora_scale")
            a, b, scale = (self.get_variable("params", n).astype(x.dtype) for n in names)
            y = y + ((x @ a) @ b * scale).reshape(y.shape)
        y = y.reshape(*lead, *shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype).reshape(shape)
        return y


class PatchEmbed(nn.Module):
    """A p x p convolution of stride p, as a matmul on patches (row, column, channel)."""

    features: int
    patch_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        p, (batch, height, width, channels) = self.patch_size, x.shape
        kernel = self.param("kernel", kernel_init, (p, p, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height // p, width // p, p * p * channels)
        return x @ kernel.reshape(-1, self.features).astype(x.dtype) + bias.astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and then cast back.

    NOTE(parity): Llama casts before it multiplies by the scale. In bfloat16 that rounds the scale,
    and small changes of it would have no effect.
    """

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exact (erf) GELU; the default of jax.nn is the tanh form."""
    return jax.nn.gelu(x, approximate=False)


def safe_norm(
    x: Float[Array, "..."], axis: int | tuple[int, ...], keepdims: bool = True
) -> Float[Array, "..."]:
    """L2 norm with gradient 0 at zero, as in torch; the gradient of jnp's is NaN there."""
    square = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def rope_frequencies(half: int, theta: float, scaling: RopeConfig) -> Float[Array, " half"]:
    """Radians a position of each of the `half` pairs of numbers in a head.

    Source: transformers' modeling_rope_utils; llama3 is that of Llama 3.1.
    """
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.type == "linear":
        return freq / scaling.factor
    if scaling.type == "llama3":  # long waves are stretched, short ones stay
        turns = scaling.original_positions * freq / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return freq * (kept + (1 - kept) / scaling.factor)
    return freq


def rope(
    x: Float[Array, "B N T H"], positions: Int[Array, "B T"], freq: Float[Array, " half"]
) -> Float[Array, "B N T H"]:
    """Rotary positions, half-split form (pairs are i and i + H/2), angles in float32."""
    angle = positions[:, None, :, None].astype(jnp.float32) * freq  # [B, 1, T, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    swapped = lax.platform_dependent(x, tpu=swap_by_matmul, default=swap_halves)
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


def swap_halves(x: Float[Array, "*b H"]) -> Float[Array, "*b H"]:
    """[a, b] -> [b, a]."""
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)


def swap_by_matmul(x: Float[Array, "*b H"]) -> Float[Array, "*b H"]:
    """The same, exactly, for TPUs, which move numbers between lanes slowly."""
    size = x.shape[-1]
    swap = jnp.roll(jnp.eye(size, dtype=x.dtype), size // 2, axis=0)
    return jnp.matmul(x, swap, precision="highest")
