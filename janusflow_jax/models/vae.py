"""The variational autoencoder of SDXL, SD 3 and FLUX: pixels <-> latents, frozen in JanusFlow.

Source: latent diffusion, arXiv 2112.10752; the reference is diffusers' AutoencoderKL, and
AutoencoderKLFlux2 for FLUX.2, which differ in the statistics of `scale` only. It pads
(0, 1) before a convolution of stride 2, decodes with one layer more a block than it encodes, and
upsamples by nearest neighbor.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.config import VaeConfig
from janusflow_jax.models import layers
from janusflow_jax.models.attention import dot_product_attention

LOGVAR_RANGE = (-30.0, 20.0)


class Conv3x3(nn.Module):
    """3x3 convolution. Stride 2 pads bottom and right only, as the published code does."""

    features: int
    stride: int = 1
    kernel_init: layers.Init = layers.kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padding = "SAME" if self.stride == 1 else ((0, 1), (0, 1))
        out = lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + bias.astype(x.dtype)


class GroupNorm(nn.Module):
    """Group norm in float32 with the two-pass variance.

    Not flax's: one long float32 sum over the pixels has an error of 1e-5 on CPU at 64 px.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y * lax.rsqrt(self._mean(y * y) + self.eps)
        return (y * scale + bias).astype(x.dtype)

    def _mean(self, y: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        """Mean of each channel's group."""
        # Rows, then columns, then groups: short sums, and the pixels keep their layout.
        channel = jnp.mean(jnp.mean(y, axis=2), axis=1)
        size = y.shape[-1] // self.groups
        group = jnp.mean(channel.reshape(len(y), self.groups, size), axis=-1)
        return jnp.repeat(group, size, axis=-1)[:, None, None]


class Resnet(nn.Module):
    cfg: VaeConfig
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = lambda name: GroupNorm(self.cfg.norm_groups, self.cfg.norm_eps, name=name)  # noqa: E731
        h = Conv3x3(self.features, name="conv1")(jax.nn.silu(norm("norm1")(x)))
        h = Conv3x3(self.features, kernel_init=nn.initializers.zeros, name="conv2")(
            jax.nn.silu(norm("norm2")(h))
        )
        if x.shape[-1] != self.features:
            x = layers.Linear(self.features, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Single-head attention over all positions."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.cfg.norm_groups, self.cfg.norm_eps, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (layers.Linear(channels, name=n)(h)[:, :, None] for n in ("q", "k", "v"))
        h = dot_product_attention(q, k, v)[:, :, 0]
        h = layers.Linear(channels, kernel_init=nn.initializers.zeros, name="o")(h)
        return x + h.reshape(x.shape)


class Mid(nn.Module):
    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Resnet(self.cfg, x.shape[-1], name="resnet_0")(x)
        x = Attention(self.cfg, name="attn")(x)
        return Resnet(self.cfg, x.shape[-1], name="resnet_1")(x)


class Down(nn.Module):
    cfg: VaeConfig
    features: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.cfg.layers_per_block):
            x = Resnet(self.cfg, self.features, name=f"resnet_{i}")(x)
        return Conv3x3(self.features, stride=2, name="downsample")(x) if self.downsample else x


class Up(nn.Module):
    cfg: VaeConfig
    features: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.cfg.layers_per_block + 1):
            x = Resnet(self.cfg, self.features, name=f"resnet_{i}")(x)
        if not self.upsample:
            return x
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv3x3(self.features, name="upsample")(x)


class Encoder(nn.Module):
    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        cfg, last = self.cfg, len(self.cfg.channels) - 1
        x = Conv3x3(cfg.channels[0], name="conv_in")(x)
        for i, features in enumerate(cfg.channels):
            x = Down(cfg, features, i < last, name=f"down_{i}")(x)
        x = Mid(cfg, name="mid")(x)
        x = jax.nn.silu(GroupNorm(cfg.norm_groups, cfg.norm_eps, name="norm_out")(x))
        return Conv3x3(2 * cfg.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        cfg, last = self.cfg, len(self.cfg.channels) - 1
        channels = cfg.decoder_channels or cfg.channels
        x = Mid(cfg, name="mid")(Conv3x3(channels[-1], name="conv_in")(x))
        for i, features in enumerate(reversed(channels)):
            x = Up(cfg, features, i < last, name=f"up_{i}")(x)
        x = jax.nn.silu(GroupNorm(cfg.norm_groups, cfg.norm_eps, name="norm_out")(x))
        return Conv3x3(3, name="conv_out")(x)


class Vae(nn.Module):
    """Latents are those of the autoencoder: callers apply `scale` and `unscale`."""

    cfg: VaeConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)
        if self.cfg.quant_convs:
            self.quant_conv = layers.Linear(2 * self.cfg.latent_channels)
            self.post_quant_conv = layers.Linear(self.cfg.latent_channels)

    def encode(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Images in [-1, 1] -> the posterior's mean and log variance, float32."""
        moments = self.encoder(images.astype(self.dtype))
        if self.cfg.quant_convs:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Latents -> images, float32, about [-1, 1] and not clipped."""
        x = latents.astype(self.dtype)
        if self.cfg.quant_convs:
            x = self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """The reconstruction from the posterior's mean."""
        return self.decode(self.encode(images)[0])


def scale(cfg: VaeConfig, latents: Float[Array, "*b h w C"]) -> Float[Array, "*b h w C"]:
    """The autoencoder's latents -> latents of about mean 0 and variance 1, which the model sees."""
    if cfg.shift:
        latents = latents - _over_latent(cfg.shift, latents)
    latents = latents * cfg.scaling_factor
    return latents / _over_latent(cfg.std, latents) if cfg.std else latents


def unscale(cfg: VaeConfig, latents: Float[Array, "*b h w C"]) -> Float[Array, "*b h w C"]:
    """The inverse of `scale`."""
    if cfg.std:
        latents = latents * _over_latent(cfg.std, latents)
    latents = latents / cfg.scaling_factor
    return latents + _over_latent(cfg.shift, latents) if cfg.shift else latents


def _over_latent(values: tuple[float, ...], latents: Array) -> np.ndarray:
    """`shift` or `std` in a shape that broadcasts over latents [..., h, w, C]."""
    height, width, channels = latents.shape[-3:]
    array = np.asarray(values, np.float32)
    if len(values) in (1, channels):
        return array
    cell = array.reshape(channels, 2, 2).transpose(1, 2, 0)
    return np.tile(cell, (height // 2, width // 2, 1))


def init_params(cfg: VaeConfig, key: Array) -> dict[str, Any]:
    """Fresh float32 parameters."""
    side = 2 * 2 ** (len(cfg.channels) - 1)
    return Vae(cfg).init(key, jnp.zeros((1, side, side, 3)))["params"]


def param_shapes(cfg: VaeConfig) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
