"""The understanding encoder: a SigLIP vision transformer without its pooling head.

Pre-LN blocks, GELU, learned positions, final LN, no class token. Source: SigLIP, arXiv 2303.15343,
and SigLIP 2, arXiv 2502.14786; the reference is big_vision's ViT.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from janusflow_jax.config import SiglipConfig
from janusflow_jax.models import layers
from janusflow_jax.models.attention import dot_product_attention
from janusflow_jax.parallel import sharding


def layer_norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
    # The fast variance, flax's default, loses digits.
    return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        q, k, v = (layers.Linear(width, heads=self.num_heads, name=n)(x) for n in ("q", "k", "v"))
        out = dot_product_attention(q, k, v).reshape(x.shape)
        return layers.Linear(width, name="o")(out)


class Mlp(nn.Module):
    width: int
    act: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layers.Linear(self.width, name="fc1")(x)
        y = layers.gelu(y) if self.act == "gelu" else jax.nn.gelu(y, approximate=True)
        return layers.Linear(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
    cfg: SiglipConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        eps = self.cfg.norm_eps
        h = layer_norm(eps, x.dtype, "norm1")(x)
        x = x + Attention(self.cfg.num_heads, name="attn")(h)
        h = layer_norm(eps, x.dtype, "norm2")(x)
        x = x + Mlp(self.cfg.mlp_width, self.cfg.act, name="mlp")(h)
        return sharding.constrain(x, "batch", None, None)


class Body(nn.Module):
    cfg: SiglipConfig
    remat: bool

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        return block(self.cfg, name="block")(x), None


class Siglip(nn.Module):
    """The image tower: pixels to one feature vector a patch, row-major."""

    cfg: SiglipConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """Args: images: in [-1, 1]. Returns: features, after the final norm if there is one."""
        cfg = self.cfg
        if cfg.pixel_mean:
            mean, std = jnp.asarray(cfg.pixel_mean), jnp.asarray(cfg.pixel_std)
            images = (images - mean) / std
        side = cfg.image_size // cfg.patch_size * cfg.patch_size
        if side < cfg.image_size:  # the published convolution leaves the last pixels out
            images = images[:, :side, :side]
        embed = layers.PatchEmbed(cfg.width, cfg.patch_size, name="patch_embed")
        x = embed(images.astype(self.dtype)).reshape(len(images), cfg.num_tokens, cfg.width)
        # Initialized as in SigLIP: at 0.02 a small tower takes long to see shapes.
        init = nn.initializers.normal(cfg.width**-0.5)
        position = self.param("pos_embedding", init, (cfg.num_tokens, cfg.width))
        x = sharding.constrain(x + position.astype(x.dtype), "batch", None, None)
        stack = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
        )
        x, _ = stack(cfg, self.remat, name="layers")(x, None)
        return layer_norm(cfg.norm_eps, x.dtype, "norm")(x) if cfg.final_norm else x
