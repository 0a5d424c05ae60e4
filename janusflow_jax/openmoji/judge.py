"""A small image tower and a small text tower that were trained together on the quick start's
drawings (`experiments/starts/train_judge.py`): how well does a picture fit its prompt, and how far
do painted pictures lie from drawn ones?

Its scores are of this project alone. They are not FID and not CLIP score, and compare models of
the quick start with one another only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import SiglipConfig
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.hub import safetensors as safetensors_io
from janusflow_jax.models import encode, layers, siglip
from janusflow_jax.openmoji.scores import Label
from janusflow_jax.parallel import trees

START = "starts/emoji_judge"
FILE = "judge.json"
WEIGHTS = "judge"
_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the towers, and what the text tower knows."""

    image: SiglipConfig
    classes: tuple[str, ...]
    colours: tuple[str, ...]
    text_width: int = 64
    width: int = 64  # of the space that both towers share


class Judge(nn.Module):
    """Two towers into one space; what comes out has length 1."""

    cfg: JudgeConfig

    def setup(self) -> None:
        cfg = self.cfg
        normal = nn.initializers.normal(cfg.text_width**-0.5)
        self.siglip = siglip.Siglip(cfg.image)
        self.image_head = layers.Linear(cfg.width)
        self.classes = self.param("classes", normal, (len(cfg.classes), cfg.text_width))
        self.colours = self.param("colours", normal, (len(cfg.colours), cfg.text_width))
        self.text_fc1 = layers.Linear(4 * cfg.text_width)
        self.text_fc2 = layers.Linear(cfg.width)
        self.scale = self.param("scale", nn.initializers.constant(np.log(10.0)), (1,))

    def embed_image(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Args: images in [-1, 1]."""
        return _unit(self.image_head(jnp.mean(self.siglip(images), axis=1)))

    def embed_text(
        self, classes: Int[Array, " B"], colours: Int[Array, " B"]
    ) -> Float[Array, "B D"]:
        """Args: indices into the config's classes and colours."""
        x = jnp.concatenate([self.classes[classes], self.colours[colours]], axis=-1)
        return _unit(self.text_fc2(layers.gelu(self.text_fc1(x))))

    def __call__(
        self, images: Float[Array, "B H W 3"], classes: Int[Array, " N"], colours: Int[Array, " N"]
    ) -> Float[Array, "B N"]:
        """Every picture against every text: cosines times the learned scale."""
        likeness = self.embed_image(images) @ self.embed_text(classes, colours).T
        return jnp.exp(self.scale) * likeness


def _unit(x: Array) -> Array:
    return x / layers.safe_norm(x, -1, keepdims=True)


def all_labels(cfg: JudgeConfig) -> list[Label]:
    """Every (class, colour) pair that the judge knows, in its order."""
    return [Label(name, colour) for name in cfg.classes for colour in cfg.colours]


def indices(cfg: JudgeConfig, labels: Sequence[Label]) -> tuple[np.ndarray, np.ndarray]:
    """The text tower's input for labels, int32[N] each.

    Raises:
      JanusFlowError: labels that the judge never learned (lists all).
    """
    classes = {name: i for i, name in enumerate(cfg.classes)}
    colours = {name: i for i, name in enumerate(cfg.colours)}
    unknown = sorted(
        {f"{x.colour} {x.name}" for x in labels if x.name not in classes or x.colour not in colours}
    )
    if unknown:
        raise JanusFlowError(
            f"judge: expected pairs of its {len(classes)} classes and {len(colours)} colours; "
            f"got {unknown}"
        )
    return (
        np.asarray([classes[x.name] for x in labels], np.int32),
        np.asarray([colours[x.colour] for x in labels], np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(cfg: JudgeConfig, params: Any, images: Array) -> Array:
    x = encode.to_float(images, jnp.float32)
    return Judge(cfg).apply({"params": params}, x, method="embed_image")


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(cfg: JudgeConfig, params: Any, classes: Array, colours: Array) -> Array:
    return Judge(cfg).apply({"params": params}, classes, colours, method="embed_text")


@dataclasses.dataclass(frozen=True)
class LoadedJudge:
    """A judge that is ready to score."""

    cfg: JudgeConfig
    params: Any  # float32
    about: dict[str, Any]  # of `judge.json`: its own accuracy, what made it
    sha256: str  # of its weights

    def pictures(self, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "N D"]:
        """Features of length 1, a part at a time, so that a picture's do not depend on how many
        there are."""
        out, side = [], self.cfg.image.image_size
        given = np.stack(list(pictures))
        if given.shape[1:] != (side, side, 3):
            raise JanusFlowError(
                f"judge: expected pictures of {side} x {side}; got {given.shape[1]} x "
                f"{given.shape[2]}: it judges the quick start's pictures only"
            )
        for at in range(0, len(given), _AT_ONCE):
            part = given[at : at + _AT_ONCE]
            room = np.pad(part, ((0, _AT_ONCE - len(part)), (0, 0), (0, 0), (0, 0)))
            out.append(np.asarray(_embed_images(self.cfg, self.params, room))[: len(part)])
        return np.concatenate(out)

    def texts(self, labels: Sequence[Label]) -> Float[np.ndarray, "N D"]:
        """Features of length 1."""
        return np.asarray(_embed_texts(self.cfg, self.params, *indices(self.cfg, labels)))

    def every_text(self) -> Float[np.ndarray, "M D"]:
        """Of all pairs that it knows (`all_labels`)."""
        return self.texts(all_labels(self.cfg))


def load(path: Any) -> LoadedJudge:
    """Reads what `save` has written.

    Raises:
      CheckpointError: nothing there, or arrays that do not fit the config.
    """
    folder = epath.Path(path)
    if not (folder / FILE).exists():
        raise CheckpointError(
            f"{folder}: expected a judge ({FILE}); found none. It ships as {START}; "
            "experiments/starts/train_judge.py makes one"
        )
    about = checksums.read_json(folder / FILE)
    given = about["config"]
    cfg = JudgeConfig(
        **{
            **given,
            "image": config_lib.from_dict(SiglipConfig, given["image"]),
            "classes": tuple(given["classes"]),
            "colours": tuple(given["colours"]),
        }
    )
    weights = folder / f"{WEIGHTS}.safetensors"
    found = safetensors_io.open_folder(folder, (WEIGHTS,))
    params = trees.nested({n: np.asarray(x).astype(np.float32) for n, x in found.tensors.items()})
    want, have = trees.flat(param_shapes(cfg)), trees.flat(params)
    wrong = sorted(n for n in want.keys() | have if _shape(want, n) != _shape(have, n))
    problems = [*found.problems, *(f"{n}: does not fit its config" for n in wrong)]
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    return LoadedJudge(cfg, params, about, hashlib.sha256(weights.read_bytes()).hexdigest())


def _shape(tree: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(tree[name].shape) if name in tree else None


@functools.partial(jax.jit, static_argnums=0)
def init_params(cfg: JudgeConfig, key: Array) -> Any:
    """Fresh parameters, float32."""
    side, one = cfg.image.image_size, jnp.zeros(1, jnp.int32)
    return Judge(cfg).init(key, jnp.zeros((1, side, side, 3)), one, one)["params"]


def param_shapes(cfg: JudgeConfig) -> Any:
    return jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))


def save(path: Any, cfg: JudgeConfig, params: Any, about: dict[str, Any]) -> None:
    """Writes a judge, its weights in bfloat16."""
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {n: np.asarray(x).astype(ml_dtypes.bfloat16) for n, x in trees.flat(params).items()}
    (folder / f"{WEIGHTS}.safetensors").write_bytes(safetensors_io.to_bytes(sorted(leaves.items())))
    given = json.loads(json.dumps(dataclasses.asdict(cfg)))
    text = json.dumps({"config": given, **about}, indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n")
