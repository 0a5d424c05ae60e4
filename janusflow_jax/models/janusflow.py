"""JanusFlow: the composition of the parts, and the assembly of rows from text and image slots.

An image is always a slot of 1 + num_image_tokens positions: `[und_begin, SigLIP features]` or
`[t_emb, latent features]` (arXiv 2411.07975 section 3.1, docs/model.md). Training, chat and
sampling fill slots with the same functions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from janusflow_jax.config import GENERATE, NONE, ModelConfig
from janusflow_jax.models import convnext, layers, llama, siglip, vae
from janusflow_jax.parallel import sharding


class RepaHead(nn.Module):
    """Three linears with SiLU between: LLM features -> SigLIP features (REPA, arXiv 2410.06940)."""

    width: int
    out_width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b E"]:
        x = jax.nn.silu(layers.Linear(self.width, name="linear_0")(x))
        x = jax.nn.silu(layers.Linear(self.width, name="linear_1")(x))
        return layers.Linear(self.out_width, name="linear_2")(x)


class BeginEmbedding(nn.Module):
    """The learned embedding in place of the token `<image_beg>`."""

    width: int

    @nn.compact
    def __call__(self) -> Float[Array, " D"]:
        return self.param("embedding", nn.initializers.normal(0.02), (self.width,))


class LatentEncoder(nn.Module):
    """The understanding encoder of ablation C: a trainable SDXL-VAE encoder and ConvNeXt blocks.

    The posterior's mean is encoded as a latent without noise, at t = 1 (docs/model.md).
    """

    cfg: ModelConfig
    dtype: Any

    def setup(self) -> None:
        self.vae = vae.Vae(self.cfg.vae, self.dtype)
        self.convnext = convnext.GenEncoder(self.cfg.gen, self.cfg.llm.width, self.dtype)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B S G"]:
        mean, _ = self.vae.encode(images)
        return encode_clean(self.convnext, vae.scale(self.cfg.vae, mean))


def encode_clean(encoder: Any, latents: Float[Array, "B H W C"]) -> Float[Array, "B S G"]:
    """Features, row-major, of scaled latents without noise (t = 1)."""
    features, _ = encoder(latents, jnp.ones((len(latents),)))
    return features.reshape(len(latents), -1, features.shape[-1])


class JanusFlow(nn.Module):
    """Every part but the VAE, which has a parameter tree of its own."""

    cfg: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    impl: str = "xla"
    scan_layers: bool = True

    def setup(self) -> None:
        cfg, dtype = self.cfg, self.dtype
        self.llm = llama.Llama(cfg.llm, dtype, self.remat, self.impl, self.scan_layers)
        # XLA's attention suits the tower's head dimension and length on every platform.
        if cfg.und_encoder == "siglip":
            self.und_encoder = siglip.Siglip(cfg.und, dtype, self.remat != "none")
        elif cfg.und_encoder == "own":
            encoder = LatentEncoder if self.remat == "none" else nn.remat(LatentEncoder)
            self.und_encoder = encoder(cfg, dtype)
        if cfg.repa_target == "siglip":
            self.repa_target = siglip.Siglip(cfg.und, dtype, self.remat != "none")
        self.und_aligner = layers.Linear(cfg.llm.width)
        self.und_begin = BeginEmbedding(cfg.llm.width)
        self.gen_encoder = convnext.GenEncoder(cfg.gen, cfg.llm.width, dtype)
        self.gen_aligner = layers.Linear(cfg.llm.width)
        self.gen_norm = layers.RMSNorm(cfg.llm.norm_eps)
        self.gen_head = layers.Linear(cfg.gen.width)
        self.gen_decoder = convnext.GenDecoder(cfg.gen, cfg.vae.latent_channels, dtype)
        self.repa_head = RepaHead(cfg.repa.width, cfg.und.width)

    def siglip(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B S E"]:
        """SigLIP features, the target of REPA, of images in [-1, 1]."""
        own = self.cfg.repa_target == "siglip"
        return self.repa_target(images) if own else self.und_encoder(images)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.llm.embed(tokens)

    def understanding_slot(self, x: Float[Array, "B ..."]) -> Float[Array, "B S D"]:
        """The vectors of a slot: `[und_begin, aligned features]`.

        Args:
          x: images [B, H, W, 3] in [-1, 1]; with a shared encoder scaled latents [B, h, w, C].
        """
        shared = self.cfg.und_encoder == "shared"
        return self.features_slot(
            encode_clean(self.gen_encoder, x) if shared else self.und_encoder(x)
        )

    def understanding_features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B S E"]:
        """SigLIP features, which understanding reads, of images in [-1, 1]."""
        return self.und_encoder(images)

    def features_slot(self, features: Float[Array, "B N E"]) -> Float[Array, "B S D"]:
        """`understanding_slot` from the features of its encoder."""
        features = self.und_aligner(features)
        begin = jnp.broadcast_to(
            self.und_begin().astype(features.dtype), (len(features), 1, features.shape[-1])
        )
        return jnp.concatenate([begin, features], axis=1)

    def generation_slot(
        self, z: Float[Array, "B H W C"], t: Float[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B h w G"], Float[Array, "B D"]]:
        """The vectors of a slot for noisy latents, and what the decoder reuses.

        Args: z: noisy latents; t: times in [0, 1].
        Returns: `[t_emb, aligned features]`, the encoder's features, t_emb.
        """
        features, t_emb = self.gen_encoder(z, t)
        aligned = self.gen_aligner(features.reshape(len(z), -1, features.shape[-1]))
        return jnp.concatenate([t_emb[:, None], aligned], axis=1), features, t_emb

    def embed_time(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        return self.gen_encoder.time_embed(t)

    def velocity(
        self,
        hidden: Float[Array, "B S D"],
        features: Float[Array, "B h w G"],
        t_emb: Float[Array, "B D"],
    ) -> Float[Array, "B H W C"]:
        """The velocity, float32, from the LLM's final states at the latent positions of a slot.

        Args: t_emb: of the time of the latents. With that of a later time r, a student gives the
          average velocity from t to r.
        """
        x = self.gen_head(self.gen_norm(hidden)).reshape(features.shape)
        return self.gen_decoder(x, features, t_emb).astype(jnp.float32)

    def run_llm(self, x: Array, positions: Array, mask: Array, **kwargs: Any) -> Any:
        """See `llama.Llama.__call__`."""
        return self.llm(x, positions, mask, **kwargs)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        return self.llm.logits(hidden)

    def project_repa(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b E"]:
        return self.repa_head(hidden)

    def init_all(self) -> None:
        """Uses every parameter once, on the smallest inputs; only for `init`."""
        cfg = self.cfg
        image = jnp.zeros((1, cfg.image_size, cfg.image_size, 3), self.dtype)
        latents = jnp.zeros((1, *cfg.latent_shape), self.dtype)
        self.understanding_slot(latents if cfg.und_encoder == "shared" else image)
        if cfg.repa_target == "siglip":
            self.repa_target(image)
        slot, features, t_emb = self.generation_slot(latents, jnp.zeros((1,)))
        length = slot.shape[1]
        positions = jnp.arange(length)[None]
        x = self.embed_tokens(jnp.zeros((1, length), jnp.int32)) + slot
        hidden, _, _ = self.llm(x, positions, jnp.ones((1, length, length), bool))
        self.velocity(hidden[:, 1:], features, t_emb)
        self.logits(hidden[:, :1])
        self.project_repa(hidden)


def init_params(cfg: ModelConfig, key: Array) -> dict[str, Any]:
    """Fresh float32 parameters of every part but the VAE."""
    return JanusFlow(cfg).init(key, method="init_all")["params"]


def param_shapes(cfg: ModelConfig) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


@jax.named_scope("place_slots")
def place_slots(
    text: Float[Array, "B T D"],
    gen: Float[Array, "B G S D"] | None,
    und: Float[Array, "B U S D"] | None,
    slot_start: Int[Array, "B K"],
    slot_task: Int[Array, "B K"],
) -> Float[Array, "B T D"]:
    """Assembles rows: text embeddings with the vectors of each slot at its positions.

    Generation vectors belong to slots[:G], understanding vectors to slots[K-U:]. One gather.
    """
    slots = [x for x in (gen, und) if x is not None and x.shape[1]]
    if not slots:
        return text
    num_slots, length = slot_start.shape[1], slots[0].shape[2]
    num_gen = gen.shape[1] if gen is not None else 0
    num_und = und.shape[1] if und is not None else 0
    k = jnp.arange(num_slots)
    first = jnp.where(slot_task == GENERATE, k, num_gen + k - (num_slots - num_und)) * length
    offset = jnp.arange(text.shape[1])[None, :, None] - slot_start[:, None]  # [B, T, K]
    inside = (offset >= 0) & (offset < length) & (slot_task != NONE)[:, None]
    source = jnp.sum(jnp.where(inside, first[:, None] + offset, 0), axis=-1)  # slots never overlap
    vectors = jnp.concatenate(slots, axis=1)
    vectors = vectors.reshape(len(text), -1, text.shape[-1]).astype(text.dtype)
    vectors = sharding.constrain(vectors, "batch", None, None)  # a gather inside each row
    placed = jnp.take_along_axis(vectors, source[..., None], axis=1)
    return jnp.where(inside.any(-1)[..., None], placed, text)


@jax.named_scope("gather_slots")
def gather_slots(
    x: Float[Array, "B T D"], slot_start: Int[Array, "B K"], length: int
) -> Float[Array, "B K S D"]:
    """Reads back the `length` feature positions of each slot, those after its first vector."""
    index = slot_start[..., None] + 1 + jnp.arange(length)  # [B, K, S]
    index = jnp.minimum(index, x.shape[1] - 1).reshape(len(x), -1)
    x = sharding.constrain(x, "batch", None, None)
    features = jnp.take_along_axis(x, index[..., None], axis=1)
    return features.reshape(*slot_start.shape, length, x.shape[-1])
