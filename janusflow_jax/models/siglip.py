"""The understanding encoder: a SigLIP vision transformer without its pooling head.

Pre-LN blocks, erf GELU, learned positions, final LN, no class token (SPEC section 1). Source:
SigLIP, arXiv 2303.15343; big_vision's ViT is the reference.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from janusflow_jax.config import SiglipConfig
from janusflow_jax.models import layers
from janusflow_jax.parallel import sharding


class Attention(nn.Module):
    num_heads: int
    impl: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, width = x.shape
        q, k, v = (
            layers.Linear(width, name=name)(x).reshape(batch, length, self.num_heads, -1)
            for name in ("q", "k", "v")
        )
        out = layers.attention(q, k, v, impl=self.impl).reshape(x.shape)
        return layers.Linear(width, name="o")(out)


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layers.gelu(layers.Linear(self.width, name="fc1")(x))
        return layers.Linear(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
    cfg: SiglipConfig
    impl: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        eps = self.cfg.norm_eps
        h = layers.LayerNorm(eps, name="norm1")(x)
        x = x + Attention(self.cfg.num_heads, self.impl, name="attn")(h)
        h = layers.LayerNorm(eps, name="norm2")(x)
        x = x + Mlp(self.cfg.mlp_width, name="mlp")(h)
        return sharding.constrain(x, "batch", None, None)


class Body(nn.Module):
    cfg: SiglipConfig
    impl: str
    remat: bool

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        return block(self.cfg, self.impl, name="block")(x), None


class Siglip(nn.Module):
    """Image tower: pixels to one feature a patch, row-major."""

    cfg: SiglipConfig
    dtype: Any = jnp.float32
    remat: bool = False
    impl: str = "xla"

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """Args: images in [-1, 1]. Returns: features after the final norm (if it has one)."""
        cfg = self.cfg
        if cfg.pixel_mean:
            mean, std = jnp.asarray(cfg.pixel_mean), jnp.asarray(cfg.pixel_std)
            images = (images - mean) / std
        batch, p = images.shape[0], cfg.patch_size
        side = cfg.image_size // p
        x = images.astype(self.dtype).reshape(batch, side, p, side, p, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * side, p * p * 3)
        x = PatchEmbed(cfg.width, p, name="patch_embed")(x)
        # Fresh, as the published SigLIP was: at 0.02 a small tower is blind to shapes for long.
        init = nn.initializers.normal(cfg.width**-0.5)
        position = self.param("pos_embedding", init, (cfg.num_tokens, cfg.width))
        x = sharding.constrain(x + position.astype(x.dtype), "batch", None, None)
        stack = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
        )
        x, _ = stack(cfg, self.impl, self.remat, name="layers")(x, None)
        return layers.LayerNorm(cfg.norm_eps, name="norm")(x) if cfg.final_norm else x


class PatchEmbed(nn.Module):
    """A stride-p convolution, written as a matmul on flattened patches (row, column, colour)."""

    width: int
    patch_size: int

    @nn.compact
    def __call__(self, patches: Float[Array, "B S P"]) -> Float[Array, "B S D"]:
        p = self.patch_size
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2)
        )
        kernel = self.param("kernel", init, (p, p, 3, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        kernel = kernel.reshape(-1, self.width).astype(patches.dtype)
        return patches @ kernel + bias.astype(patches.dtype)
