"""CLIP and the CLIP score: how well images agree with their prompts.

Source: arXiv 2103.00020; the reference is transformers' CLIPModel. The JanusFlow paper uses
CLIP ViT-L/14, `openai/clip-vit-large-patch14` on the hub. `load` reads that folder as published.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub import configs, safetensors as safetensors_io, tensors
from janusflow_jax.hub.names import Rule
from janusflow_jax.models import layers
from janusflow_jax.models.attention import dot_product_attention

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels, in [0, 1], with which every CLIP of OpenAI and OpenCLIP was trained."""
_BATCH = 64
_UNUSED = r"((text|vision)_model\.embeddings\.position_ids|logit_scale)$"


# --- the model


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One transformer. The defaults are transformers' for the text tower of ViT-B/32."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    text: TowerConfig
    image: TowerConfig
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The sigmoid form of GELU with which OpenAI trained CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": layers.gelu}


def _norm(cfg: TowerConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(cfg.layer_norm_eps, use_fast_variance=False, name=name)


class Block(nn.Module):
    cfg: TowerConfig
    hidden_act: str

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, None]:
        cfg, (batch, length, width) = self.cfg, x.shape
        h = _norm(cfg, "layer_norm1")(x)
        q, k, v = (
            layers.Linear(width, name=name)(h).reshape(batch, length, cfg.num_attention_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = dot_product_attention(q, k, v, mask).reshape(x.shape)
        x = x + layers.Linear(width, name="out_proj")(h)
        h = layers.Linear(cfg.intermediate_size, name="fc1")(_norm(cfg, "layer_norm2")(x))
        h = ACTIVATIONS[self.hidden_act](h)
        return x + layers.Linear(width, name="fc2")(h), None


def _stack(cfg: TowerConfig, hidden_act: str) -> Any:
    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=cfg.num_hidden_layers,
    )
    return stack(cfg, hidden_act, name="layers")


class ImageTower(nn.Module):
    cfg: ClipConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        cfg, tower = self.cfg, self.cfg.image
        width, normal = tower.hidden_size, nn.initializers.normal(0.02)
        side = (cfg.patch_size, cfg.patch_size)
        x = nn.Conv(width, side, side, "VALID", use_bias=False, name="patch_embed")(images)
        x = x.reshape(len(images), cfg.num_patches, width)
        first = self.param("class_embedding", normal, (width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, width)), x], axis=1)
        x = x + self.param("pos_embedding", normal, (cfg.num_patches + 1, width))
        x, _ = _stack(tower, cfg.hidden_act)(_norm(tower, "pre_norm")(x), None)
        x = _norm(tower, "norm")(x[:, 0])
        return layers.Linear(cfg.projection_dim, use_bias=False, name="head")(x)


class TextTower(nn.Module):
    cfg: ClipConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
        cfg, tower = self.cfg, self.cfg.text
        width, normal = tower.hidden_size, nn.initializers.normal(0.02)
        table = self.param("embedding", normal, (cfg.vocab_size, width))
        position = self.param("pos_embedding", normal, (cfg.max_position_embeddings, width))
        size = tokens.shape[1]
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), (len(tokens), size, size))
        x, _ = _stack(tower, cfg.hidden_act)(table[tokens] + position[:size], mask)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        x = _norm(tower, "norm")(last)
        return layers.Linear(cfg.projection_dim, use_bias=False, name="head")(x)


class Clip(nn.Module):
    """Both towers, into one feature space."""

    cfg: ClipConfig

    def setup(self) -> None:
        self.image, self.text = ImageTower(self.cfg), TextTower(self.cfg)

    def embed_images(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Args: images: of `preprocess`."""
        x = images.astype(jnp.float32) / 255
        return self.image((x - jnp.asarray(MEAN)) / jnp.asarray(STD))

    def embed_texts(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B D"]:
        """Args: lengths: the last of so many tokens is the end of the text."""
        return self.text(tokens, lengths)

    def __call__(self, images: Array, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        return self.embed_images(images), self.embed_texts(tokens, lengths)


def param_shapes(cfg: ClipConfig) -> Any:
    """Shapes of the parameters, without computing anything."""
    images = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, cfg.max_position_embeddings), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(Clip(cfg).init, jax.random.key(0), images, tokens, lengths)["params"]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _embed(cfg: ClipConfig, params: Any, method: str, *inputs: Array) -> Array:
    return Clip(cfg).apply({"params": params}, *inputs, method=method)


# --- a published folder


@dataclasses.dataclass(frozen=True)
class LoadedClip:
    """A CLIP with its parameters and its tokenizer."""

    cfg: ClipConfig
    params: Any  # float32
    tokenizer: tokenizers.Tokenizer  # cuts texts at the model's length
    sha256: str  # over the files of the weights

    def embed_images(
        self, images: Iterable[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Float[np.ndarray, "B D"]:
        """Features of images of any size, not of length 1."""
        pixels = np.stack([preprocess(image, self.cfg.image_size) for image in images])
        return self._apply("embed_images", pixels)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Features of texts, not of length 1. A long text loses its end."""
        size, out = self.cfg.max_position_embeddings, []
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            tokens, lengths = np.zeros((_BATCH, size), np.int32), np.ones(_BATCH, np.int32)
            for i, row in enumerate(part):
                tokens[i, : len(row)], lengths[i] = row, len(row)
            out.append(self._apply("embed_texts", tokens, lengths)[: len(part)])
        return np.concatenate(out)

    def _apply(self, method: str, *inputs: np.ndarray) -> np.ndarray:
        # TPUs and GPUs would otherwise round the inputs of each matmul.
        with jax.default_matmul_precision("highest"):
            return np.asarray(_embed(self.cfg, self.params, method, *inputs))


def preprocess(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> UInt8[np.ndarray, "H H 3"]:
    """Resizes the short side to `size` with PIL's bicubic filter, then crops the center."""
    height, width = image.shape[:2]
    short = min(height, width)
    new_h, new_w = size * height // short, size * width // short
    resized = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC)
    top, left = (new_h - size) // 2, (new_w - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]


def load(path: Any) -> LoadedClip:
    """Loads a folder as published: config.json, *.safetensors and tokenizer.json.

    Raises:
      ConvertError: not a CLIP, or its files do not fit each other.
      CheckpointError: a file is missing.
    """
    folder = files.resolve(path)
    cfg = config_from_hf(checksums.read_json(folder / "config.json"))
    weights = {
        name: x
        for name, x in safetensors_io.open_folder(folder).items()
        if not re.fullmatch(_UNUSED, name)
    }
    expected = param_shapes(cfg)
    tensors.check(weights, rules(), expected, folder, np.float32)
    params = tensors.from_torch(weights, rules(), expected, np.float32)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
    except Exception as error:  # tokenizers raises plain Exception
        raise ConvertError(
            f"{folder / 'tokenizer.json'}: expected CLIP's tokenizer; got {error}: download it "
            "beside the weights"
        ) from error
    tokenizer.enable_truncation(cfg.max_position_embeddings)
    if tokenizer.get_vocab_size() > cfg.vocab_size:
        raise ConvertError(
            f"{folder}: expected at most {cfg.vocab_size} tokens; got "
            f"{tokenizer.get_vocab_size()}: use this model's own tokenizer"
        )
    digests = [checksums.file_sha256(file) for file in safetensors_io.weight_files(folder)]
    return LoadedClip(cfg, jax.device_put(params), tokenizer, "+".join(digests))


def config_from_hf(values: dict[str, Any]) -> ClipConfig:
    """config.json of a CLIP; the defaults for missing keys are transformers'.

    Raises:
      ConvertError: not a CLIP, or values that are not implemented.
    """
    if values.get("model_type") != "clip":
        raise ConvertError(
            f"config.json: expected a CLIP (model_type clip); got {values.get('model_type')}: "
            "download openai/clip-vit-large-patch14"
        )
    towers, sizes, activations = [], {"projection_dim": 512}, set()
    sizes |= configs.numbers("config.json", values, sizes)
    for part, defaults, more in (
        ("text_config", TowerConfig(), {"vocab_size": 49408, "max_position_embeddings": 77}),
        ("vision_config", TowerConfig(768, 3072, 12, 12), {"image_size": 224, "patch_size": 32}),
    ):
        where, section = f"config.json: {part}", configs.json_object("config.json", values, part)
        tower = dataclasses.asdict(defaults)
        towers.append(TowerConfig(**configs.numbers(where, section, tower)))
        sizes |= configs.numbers(where, section, more)
        activations.add(section.get("hidden_act", "quick_gelu"))
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        raise ConvertError(
            f"config.json: expected hidden_act to be one of {[*ACTIVATIONS]} in both towers; got "
            f"{sorted(activations)}: use another CLIP"
        )
    return ClipConfig(*towers, **sizes, hidden_act=activations.pop())


def rules() -> list[Rule]:
    """transformers' names of CLIP's tensors, and ours."""
    out = [
        Rule("vision_model.embeddings.class_embedding", ("image/class_embedding",)),
        Rule("vision_model.embeddings.position_embedding.weight", ("image/pos_embedding",)),
        Rule(
            "vision_model.embeddings.patch_embedding.weight", ("image/patch_embed/kernel",), "conv"
        ),
        Rule("text_model.embeddings.token_embedding.weight", ("text/embedding",)),
        Rule("text_model.embeddings.position_embedding.weight", ("text/pos_embedding",)),
        Rule("visual_projection.weight", ("image/head/kernel",), "linear"),
        Rule("text_projection.weight", ("text/head/kernel",), "linear"),
    ]
    norms = [
        ("vision_model.pre_layrnorm", "image/pre_norm"),
        ("vision_model.post_layernorm", "image/norm"),
        ("text_model.final_layer_norm", "text/norm"),
    ]
    for part, ours in (("vision_model", "image"), ("text_model", "text")):
        block = f"{part}.encoder.layers.{{}}"
        norms += [(f"{block}.{x}", f"{ours}/layers/{x}") for x in ("layer_norm1", "layer_norm2")]
        linears = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
        for name in linears:
            path = f"{ours}/layers/{name.split('.')[1]}"
            out.append(Rule(f"{block}.{name}.weight", (f"{path}/kernel",), "linear"))
            out.append(Rule(f"{block}.{name}.bias", (f"{path}/bias",)))
    for name, path in norms:
        out.append(Rule(f"{name}.weight", (f"{path}/scale",)))
        out.append(Rule(f"{name}.bias", (f"{path}/bias",)))
    return out


# --- the score


def score(
    clip: LoadedClip, image_features: Float[np.ndarray, "N D"], prompts: Sequence[str]
) -> dict[str, Any]:
    """The CLIP score, 100 x cosine of each image and its prompt.

    Args: image_features: of `LoadedClip.embed_images`, in the order of the prompts.
    Returns:
      clip_score: the mean of max(100 cos, 0), as torchmetrics computes it; of: number of images;
      truncated_prompts: how many prompts lost their end.
    """
    texts = clip.embed_texts(prompts)
    norms = np.linalg.norm(image_features, axis=1) * np.linalg.norm(texts, axis=1)
    cosines = (image_features * texts).sum(1) / norms
    encodings = clip.tokenizer.encode_batch(list(prompts))
    return {
        "clip_score": float(np.maximum(100 * cosines, 0).mean()),
        "of": len(prompts),
        "truncated_prompts": sum(bool(x.overflowing) for x in encodings),
    }
