"""The judge: a small image tower and a small text tower that score the quick start's images.

Both were trained together on the quick start's drawings (`experiments/starts/train_judge.py`). Two
scores use their common feature space: the alignment of an image with its prompt, and the Frechet
distance of images from drawings. They are specific to this project. They are not CLIP score and
not FID, and only compare models of the quick start with each other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from etils import epath
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import SiglipConfig, files
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.eval import fid
from janusflow_jax.hub import safetensors as safetensors_io
from janusflow_jax.models import encode, layers, siglip
from janusflow_jax.openmoji import stats
from janusflow_jax.openmoji.scores import Label
from janusflow_jax.parallel import trees

START = "starts/emoji_judge"
FILE, WEIGHTS = "judge.json", "judge.safetensors"
MIN_IMAGES = 4
"""Images that a Frechet distance needs."""
_BATCH = 32


# --- the model


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the towers, and the words that the text tower knows."""

    image: SiglipConfig
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    text_width: int = 64
    width: int = 64  # of the common feature space

    @property
    def labels(self) -> list[Label]:
        """Every (class, color) pair, colors innermost."""
        return [Label(name, color) for name in self.classes for color in self.colors]


class Judge(nn.Module):
    """Two towers into one feature space; all features have length 1."""

    cfg: JudgeConfig

    def setup(self) -> None:
        cfg = self.cfg
        normal = nn.initializers.normal(cfg.text_width**-0.5)
        self.siglip = siglip.Siglip(cfg.image)
        self.image_head = layers.Linear(cfg.width)
        self.classes = self.param("classes", normal, (len(cfg.classes), cfg.text_width))
        self.colors = self.param("colors", normal, (len(cfg.colors), cfg.text_width))
        self.text_fc1 = layers.Linear(4 * cfg.text_width)
        self.text_fc2 = layers.Linear(cfg.width)
        self.scale = self.param("scale", nn.initializers.constant(np.log(10.0)), (1,))

    def embed_image(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Args: images in [-1, 1]."""
        return _unit(self.image_head(jnp.mean(self.siglip(images), axis=1)))

    def embed_text(
        self, classes: Int[Array, " B"], colors: Int[Array, " B"]
    ) -> Float[Array, "B D"]:
        """Args: indices into the config's classes and colors."""
        x = jnp.concatenate([self.classes[classes], self.colors[colors]], axis=-1)
        return _unit(self.text_fc2(layers.gelu(self.text_fc1(x))))

    def __call__(
        self, images: Float[Array, "B H W 3"], classes: Int[Array, " N"], colors: Int[Array, " N"]
    ) -> Float[Array, "B N"]:
        """Every image against every text: cosines times the learned scale."""
        cosines = self.embed_image(images) @ self.embed_text(classes, colors).T
        return jnp.exp(self.scale) * cosines


def _unit(x: Array) -> Array:
    return x / layers.safe_norm(x, -1, keepdims=True)


def label_indices(cfg: JudgeConfig, labels: Sequence[Label]) -> tuple[np.ndarray, np.ndarray]:
    """The text tower's input for labels: classes and colors, int32[N] each.

    Raises:
      JanusFlowError: a label that the judge does not know.
    """
    for label in labels:
        if label.name not in cfg.classes or label.color not in cfg.colors:
            raise JanusFlowError(
                f"judge: expected a class and a color that it knows; got {label}: pass --judge '' "
                "to score without it"
            )
    return (
        np.asarray([cfg.classes.index(x.name) for x in labels], np.int32),
        np.asarray([cfg.colors.index(x.color) for x in labels], np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def init_params(cfg: JudgeConfig, key: Array) -> Any:
    """Fresh parameters, float32."""
    side, one = cfg.image.image_size, jnp.zeros(1, jnp.int32)
    return Judge(cfg).init(key, jnp.zeros((1, side, side, 3)), one, one)["params"]


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(cfg: JudgeConfig, params: Any, images: Array) -> Array:
    x = encode.to_float(images, jnp.float32)
    return Judge(cfg).apply({"params": params}, x, method="embed_image")


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(cfg: JudgeConfig, params: Any, classes: Array, colors: Array) -> Array:
    return Judge(cfg).apply({"params": params}, classes, colors, method="embed_text")


@dataclasses.dataclass(frozen=True)
class LoadedJudge:
    """A judge with its parameters."""

    cfg: JudgeConfig
    params: Any  # float32
    about: dict[str, Any]  # judge.json: its accuracy, and the command that made it
    sha256: str  # of its weights

    def embed_images(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> Float[np.ndarray, "N D"]:
        """Features of images.

        Batches have a fixed size, so the features of an image do not depend on the others.

        Raises:
          JanusFlowError: images of another size.
        """
        x, side = np.stack(list(images)), self.cfg.image.image_size
        if x.shape[1:] != (side, side, 3):
            raise JanusFlowError(
                f"judge: expected images of {side} x {side}; got {x.shape[1]} x {x.shape[2]}: pass "
                "--judge '' to score without it"
            )
        out = []
        for at in range(0, len(x), _BATCH):
            part = x[at : at + _BATCH]
            padded = np.pad(part, ((0, _BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
            out.append(np.asarray(_embed_images(self.cfg, self.params, padded))[: len(part)])
        return np.concatenate(out)

    def embed_texts(self, labels: Sequence[Label]) -> Float[np.ndarray, "N D"]:
        """Features of labels."""
        return np.asarray(_embed_texts(self.cfg, self.params, *label_indices(self.cfg, labels)))


def load(path: Any) -> LoadedJudge:
    """Loads what `save` wrote.

    Raises:
      CheckpointError: no judge.
    """
    folder = files.resolve(path)
    if not (folder / FILE).exists():
        raise CheckpointError(
            f"{folder}: expected a judge ({FILE}); got none: use {START}, or train one with "
            "experiments/starts/train_judge.py"
        )
    about = checksums.read_json(folder / FILE)
    sizes = about["config"]
    cfg = JudgeConfig(
        image=config_lib.from_dict(SiglipConfig, sizes["image"]),
        classes=tuple(sizes["classes"]),
        colors=tuple(sizes["colors"]),
        text_width=sizes["text_width"],
        width=sizes["width"],
    )
    weights = safetensors_io.local(folder / WEIGHTS)
    try:
        with safetensors.safe_open(weights, framework="numpy") as file:
            leaves = {n: file.get_tensor(n).astype(np.float32) for n in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: expected a safetensors file ({error}): download it again"
        ) from error
    params = trees.unflatten(leaves)
    shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    if problems := trees.mismatches(shapes, params, WEIGHTS):
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    return LoadedJudge(cfg, params, about, checksums.file_sha256(folder / WEIGHTS))


def save(path: Any, cfg: JudgeConfig, params: Any, about: dict[str, Any]) -> None:
    """Writes a judge, its weights in bfloat16."""
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {n: jnp.asarray(x, jnp.bfloat16) for n, x in trees.flatten(params).items()}
    (folder / WEIGHTS).write_bytes(safetensors.flax.save(leaves))
    sizes = {
        "image": dataclasses.asdict(cfg.image),
        "classes": cfg.classes,
        "colors": cfg.colors,
        "text_width": cfg.text_width,
        "width": cfg.width,
    }
    text = json.dumps({"config": sizes, **about}, indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n")


# --- alignment


def score_alignment(
    judge: LoadedJudge,
    images: Sequence[np.ndarray],
    labels: Sequence[Label],
    drawings: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Cosine between image and prompt, beside the same of real drawings and of noise.

    Args:
      images: uint8[H, W, 3] each.
      labels: what each should show.
      drawings: a real drawing of each label.
    Returns:
      of: number of images; likeness: compared with the mean over shuffled prompts; in_color:
      compared with the mean over all other classes in the prompt's color (so the right color gives
      no help); median_rank: of the prompt among these; candidates: their number; top1, top5: images
      whose own text is among the nearest of all texts that the judge knows; drawn: the cosine of
      real drawings of the same prompts; drawn_top1; noise: the cosine of uniform noise.
    """
    own, texts = judge.embed_images(images), judge.embed_texts(labels)
    real = judge.embed_images(drawings)
    random = judge.embed_images(noise(images))
    every_text = judge.embed_texts(judge.cfg.labels)

    def ranks(features: np.ndarray) -> np.ndarray:
        return 1 + (features @ every_text.T > _cosines(features, texts)[:, None] + 1e-6).sum(1)

    # the texts of all classes in the prompt's color
    classes, colors = label_indices(judge.cfg, labels)
    grid = every_text.reshape(len(judge.cfg.classes), len(judge.cfg.colors), -1)
    scores = np.einsum("nd,cnd->nc", own, grid[:, colors])
    hits = np.take_along_axis(scores, classes[:, None], axis=1)
    others = (scores.sum(1) - hits[:, 0]) / (scores.shape[1] - 1)
    return {
        "of": len(labels),
        "likeness": stats.compare(*stats.against_others(own @ texts.T)),
        "in_color": stats.compare(hits[:, 0], others),
        "median_rank": float(np.median((scores > hits).sum(1) + 1)),
        "candidates": len(judge.cfg.classes),
        "top1": int((ranks(own) == 1).sum()),
        "top5": int((ranks(own) <= 5).sum()),
        "drawn": float(_cosines(real, texts).mean()),
        "drawn_top1": int((ranks(real) == 1).sum()),
        "noise": float(_cosines(random, texts).mean()),
    }


def _cosines(features: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return (features * texts).sum(1)


def noise(like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images of uniform noise, as many and as large; always the same."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, x.shape, np.uint8) for x in like]


# --- Frechet distance


def score_frechet(
    judge: LoadedJudge,
    images: Sequence[np.ndarray],
    *,
    reference: Sequence[np.ndarray],
    drawn: Sequence[np.ndarray],
    other_prompts: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Frechet distance of images from real drawings of their prompts.

    Args:
      images: uint8[H, W, 3] each, at least MIN_IMAGES.
      reference: real drawings of the images' prompts.
      drawn: another view of each image's drawing. Its distance is the floor, with the bias of the
        same sample size.
      other_prompts: as many real drawings of other prompts.
    Returns:
      of: number of images; reference: number of drawings; distances of: painted (the images), drawn
      (the floor), other_prompts and noise.
    """
    target = fid.statistics(judge.embed_images(reference))
    sets = {"painted": images, "drawn": drawn, "other_prompts": other_prompts}
    distances = {
        name: fid.frechet_distance(fid.statistics(judge.embed_images(members)), target)
        for name, members in {**sets, "noise": noise(images)}.items()
    }
    return {"of": len(images), "reference": target.count, **distances}
