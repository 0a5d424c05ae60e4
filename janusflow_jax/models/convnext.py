"""The generation encoder and decoder: shallow ConvNeXt V2 stacks around the LLM.

Source: arXiv 2411.07975 section 3, and the published code. FiLM by the time embedding comes after
the residual addition, so its initialization must leave the block the identity.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.config import GenConfig
from janusflow_jax.models import layers
from janusflow_jax.parallel import sharding

KERNEL = 7
MAX_PERIOD = 10000.0
TIMESTEP_SCALE = 1000.0
SMALL_GRID = 64
"""Positions of a grid up to which a depthwise convolution is a matmul on CPU
(`benchmarks/depthwise.py`)."""


def _shift_add(x: Array, kernel: Array) -> Array:
    """Depthwise 7x7 as 49 shifted multiply-adds: 20 to 30 times as fast as XLA's convolution on
    CPU."""
    height, width = x.shape[1:3]
    edge = KERNEL // 2
    p = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    terms = [
        p[:, i : i + height, j : j + width] * kernel[i, j, 0]
        for i in range(KERNEL)
        for j in range(KERNEL)
    ]
    return sum(terms[1:], terms[0])


def grid_matmul(
    x: Float[Array, "B h w C"], kernel: Float[Array, "7 7 1 C"]
) -> Float[Array, "B h w C"]:
    """Depthwise 7x7 as one matmul a channel, by a matrix from all positions of the grid to all.

    The work grows with the square of the number of positions: see SMALL_GRID.
    """
    batch, height, width, channels = x.shape
    size, edge = height * width, max(max(height, width) - 1 - KERNEL // 2, 0)
    taps = jnp.pad(kernel[:, :, 0], ((edge, edge), (edge, edge), (0, 0)))

    def tap(length: int) -> np.ndarray:  # [input, output]
        return np.subtract.outer(np.arange(length), np.arange(length)) + KERNEL // 2 + edge

    matrix = taps[tap(height)[:, None, :, None], tap(width)[None, :, None]]
    matrix = matrix.reshape(size, size, channels)
    y = jnp.einsum("bic,ioc->boc", x.reshape(batch, size, channels), matrix)
    return y.reshape(x.shape)


@jax.custom_vjp
def shifts(x: Float[Array, "B h w C"], kernel: Float[Array, "7 7 1 C"]) -> Float[Array, "B h w C"]:
    """Depthwise 7x7 as 49 shifted multiply-adds, in both passes."""
    return _shift_add(x, kernel)


def _shifts_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    edge = KERNEL // 2
    p = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))

    def tap(ij: Array) -> Array:
        window = lax.dynamic_slice(p, (0, ij[0], ij[1], 0), x.shape)
        return jnp.einsum("bhwc,bhwc->c", window, g)

    taps = jnp.stack(jnp.meshgrid(*[jnp.arange(KERNEL)] * 2, indexing="ij"), -1).reshape(-1, 2)
    grad = lax.map(tap, taps).reshape(kernel.shape)
    return _shift_add(g, kernel[::-1, ::-1]), grad


shifts.defvjp(lambda x, k: (_shift_add(x, k), (x, k)), _shifts_bwd)


def _depthwise_cpu(x: Array, kernel: Array) -> Array:
    is_small = x.shape[1] * x.shape[2] <= SMALL_GRID
    return grid_matmul(x, kernel) if is_small else shifts(x, kernel)


def _depthwise_conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def depthwise(
    x: Float[Array, "B h w C"], kernel: Float[Array, "7 7 1 C"]
) -> Float[Array, "B h w C"]:
    """Depthwise 7x7 convolution with zero padding, in the form that is fast on its platform."""
    return lax.platform_dependent(x, kernel, cpu=_depthwise_cpu, default=_depthwise_conv)


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        kernel = self.param("kernel", layers.kernel_init, (KERNEL, KERNEL, 1, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return depthwise(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (arXiv 2301.00808): `bias + (scale * n + 1) * x`, where n is the L2 norm
    of a channel relative to the mean over channels."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        norm = layers.safe_norm(x.astype(jnp.float32), axis=(1, 2))
        norm = norm / (jnp.mean(norm, axis=-1, keepdims=True) + self.eps)
        y = bias + (scale * norm + 1.0) * x.astype(jnp.float32)
        return y.astype(x.dtype)


class Block(nn.Module):
    cfg: GenConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], t_emb: Float[Array, "B D"]
    ) -> Float[Array, "B h w C"]:
        width = x.shape[-1]
        h = layers.RMSNorm(self.cfg.norm_eps, name="norm")(Depthwise(name="depthwise")(x))
        h = layers.gelu(layers.Linear(4 * width, name="linear_1")(h))
        h = sharding.constrain(h, "batch", None, None, "tensor")
        h = GlobalResponseNorm(name="grn")(h)
        # Zeros, so that a fresh block is the identity. The paper gives no initialization.
        x = x + layers.Linear(width, kernel_init=nn.initializers.zeros, name="linear_2")(h)
        film = layers.Linear(2 * width, kernel_init=nn.initializers.zeros, name="film")
        scale, shift = jnp.split(film(jax.nn.silu(t_emb))[:, None, None], 2, axis=-1)
        return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """Sinusoid (cosine half first) of 1000 t -> linear -> SiLU -> linear, for t in [0, 1]."""

    sin_width: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        half = self.sin_width // 2
        freq = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
        angle = (TIMESTEP_SCALE * t.astype(jnp.float32))[:, None] * freq
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1).astype(self.dtype)
        x = jax.nn.silu(layers.Linear(self.width, name="linear_1")(x))
        return layers.Linear(self.width, name="linear_2")(x)


class GenEncoder(nn.Module):
    """Noisy latents -> features, one a patch, and the time embedding."""

    cfg: GenConfig
    llm_width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        cfg = self.cfg
        self.time_embed = TimeEmbedding(cfg.width, self.llm_width, self.dtype)
        self.in_conv = layers.PatchEmbed(cfg.width, cfg.patch_size)
        self.block = [Block(cfg) for _ in range(cfg.num_blocks)]

    def __call__(
        self, z: Float[Array, "B H W C"], t: Float[Array, " B"]
    ) -> tuple[Float[Array, "B h w G"], Float[Array, "B D"]]:
        """Args: z: noisy latents; t: times in [0, 1]. Returns: features, time embedding."""
        t_emb = self.time_embed(t)
        x = self.in_conv(z.astype(self.dtype))
        for block in self.block:
            x = block(x, t_emb)
        return x, t_emb


class GenDecoder(nn.Module):
    """Features of the LLM and of the encoder -> velocity in latent space."""

    cfg: GenConfig
    latent_channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B h w G"],
        skip: Float[Array, "B h w G"],
        t_emb: Float[Array, "B D"],
    ) -> Float[Array, "B H V C"]:
        """Args: hidden: LLM features after `gen_head`; skip: the encoder's output."""
        cfg, p = self.cfg, self.cfg.patch_size
        x = layers.RMSNorm(cfg.norm_eps, name="input_norm")(hidden)
        x = jnp.concatenate([x, skip], axis=-1)
        for i in range(cfg.num_blocks):
            x = Block(cfg, name=f"block_{i}")(x, t_emb)
        x = layers.RMSNorm(cfg.norm_eps, name="out_norm")(x)
        x = layers.Linear(
            self.latent_channels * p * p, kernel_init=nn.initializers.zeros, name="out_conv"
        )(x)
        b, h, w, _ = x.shape
        # Pixel shuffle: channels are (c, row, column).
        x = x.reshape(b, h, w, self.latent_channels, p, p).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(b, h * p, w * p, self.latent_channels)
