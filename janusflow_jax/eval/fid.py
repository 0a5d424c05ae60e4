"""FID: the Frechet distance between features of generated images and of reference images.

Sources: arXiv 1706.08500 (FID), 2104.11222 (how images are resized before the network). The
JanusFlow paper follows GigaGAN's evaluation (arXiv 2303.05511), which resizes images to 256 pixels
first. Its authors resized their images with another filter, so there are three variants:

    variant   generated   references
    janus     bicubic     Lanczos      what the authors describe for JanusFlow
    gigagan   Lanczos     Lanczos      GigaGAN's script on images as generated
    bicubic   bicubic     bicubic
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError, DataError
from janusflow_jax.eval.clip import LoadedClip
from janusflow_jax.eval.inception import SIZE, LoadedInception
from janusflow_jax.parallel import trees

VARIANTS = {
    "janus": ("bicubic", "lanczos"),
    "gigagan": ("lanczos", "lanczos"),
    "bicubic": ("bicubic", "bicubic"),
}
"""Variant -> filters of the generated images and of the references. The first is primary."""
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
RESOLUTION = 256
_BATCH = 32
_MIN_REFERENCES = 4  # two in each half
_MAX_SELF_DISTANCE = 1e-3

Features = Callable[[UInt8[np.ndarray, "B H W 3"]], dict[str, Float32[np.ndarray, "B D"]]]


# --- statistics and the distance


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and scatter matrix of a set of features, in float64."""

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]  # sum of (x - mean) (x - mean)^T

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Unbiased."""
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def factor(self) -> Float[np.ndarray, "D R"]:
        """The covariance is the product of this with its transpose; R is its rank."""
        values, vectors = np.linalg.eigh(self.covariance)
        nonzero = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, nonzero] * np.sqrt(values[nonzero])


def statistics(features: Float[np.ndarray, "N D"]) -> Statistics:
    """Statistics of features.

    Raises:
      DataError: features that are non-finite.
    """
    if not trees.is_finite(features):
        raise DataError(
            f"features: {trees.NON_FINITE}: check the images and the weights of the network"
        )
    x = np.asarray(features, np.float64)
    mean = x.mean(0)
    x = x - mean
    return Statistics(len(x), mean, x.T @ x)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the union of two sets (Chan et al., 1979)."""
    count, gap = a.count + b.count, b.mean - a.mean
    mean = a.mean + gap * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(gap, gap) * (a.count * b.count / count)
    return Statistics(count, mean, scatter)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of the normal distributions with two sets' means and covariances.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It is larger for smaller sets.

    Raises:
      DataError: fewer than two features in a set.
    """
    if min(a.count, b.count) < 2:
        raise DataError(
            f"Frechet distance: expected two or more images in each set; got {a.count} and "
            f"{b.count}: use more images"
        )
    # With C_a = A A^T and C_b = B B^T, the trace of (C_a C_b)^(1/2) is the sum of the singular
    # values of A^T B. A square root of the product itself loses half the digits.
    cross = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


# --- features


def resize(image: UInt8[np.ndarray, "_ _ 3"], name: str) -> UInt8[np.ndarray, "256 256 3"]:
    """The central square, resized with one of FILTERS as in GigaGAN's evaluation."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((RESOLUTION, RESOLUTION), FILTERS[name]))


def network_input(image: UInt8[np.ndarray, "_ _ 3"]) -> Float32[np.ndarray, "299 299 3"]:
    """An image in the size of the network, bicubic and without rounding, as in clean-fid."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((SIZE, SIZE), FILTERS["bicubic"])
        for c in range(3)
    ]
    return np.stack([np.asarray(x) for x in channels], axis=-1).clip(0, 255)


def extractor(net: LoadedInception | None, clip: LoadedClip | None) -> Features:
    """The function from images to the features that `score` and `clip.score` use.

    The features of an image depend on no other image.

    Returns: a function of uint8[B, H, W, 3] that returns 'inception_bicubic' and
      'inception_lanczos' with `net`, 'clip' with `clip`.
    """

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        out = {f"inception_{name}": _embed(net, images, name) for name in FILTERS if net}
        return out | ({"clip": clip.embed_images(images)} if clip else {})

    return features


def _embed(net: LoadedInception, images: Iterable[np.ndarray], name: str) -> np.ndarray:
    def prepare(image: np.ndarray) -> np.ndarray:
        return network_input(resize(image, name))

    with futures.ThreadPoolExecutor() as pool:
        return net.embed(np.stack([*pool.map(prepare, images)]))


# --- references


@dataclasses.dataclass(frozen=True)
class References:
    """Statistics of the reference images, by filter."""

    statistics: dict[str, Statistics]
    halves: dict[str, float]  # distance of every other image from the rest
    sha256: str  # of the images' names and sizes


def references(
    folder: Any, names: Sequence[str], net: LoadedInception, cache: Any = None
) -> References:
    """Statistics of reference images, which are computed once.

    Args:
      folder: of the images.
      names: their paths below the folder.
      cache: a folder that keeps the statistics for the next call with files of the same names and
        sizes; None: do not keep them.
    Raises:
      DataError: an image that is missing or cannot be read, too few images, or references that
        are not at distance 0 from themselves.
      CheckpointError: a damaged file in the cache.
    """
    folder = files.resolve(folder)
    with futures.ThreadPoolExecutor(_BATCH) as pool:  # of a bucket, every size is a request
        sizes = [*pool.map(lambda name: _size(folder / name), names)]
    lines = [f"{name} {size}" for name, size in zip(names, sizes, strict=True)]
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = hashlib.sha256(f"{sha256} {net.sha256}".encode()).hexdigest()[:16]
    file = files.resolve(cache) / f"fid_references_{key}.npz" if cache else None
    if file and file.exists():
        return _read_references(file, sha256)
    if len(names) < _MIN_REFERENCES:
        raise DataError(
            f"{folder}: expected {_MIN_REFERENCES} or more reference images; got {len(names)}: use "
            "more"
        )
    # Lists are often sorted by category, so a half is every other image.
    parts = [_measure(folder, part, net) for part in (names[::2], names[1::2])]
    out = References(
        {name: merge(parts[0][name], parts[1][name]) for name in FILTERS},
        {name: frechet_distance(parts[0][name], parts[1][name]) for name in FILTERS},
        sha256,
    )
    for name, x in out.statistics.items():
        if not abs(distance := frechet_distance(x, x)) < _MAX_SELF_DISTANCE:
            raise DataError(
                f"{folder}: expected references ({name}) at distance 0 from themselves; got "
                f"{distance}: check the weights of the network"
            )
    if file:
        _write_references(file, out)
    return out


def _measure(
    folder: epath.Path, names: Sequence[str], net: LoadedInception
) -> dict[str, Statistics]:
    """Statistics by filter; the images are read and embedded in batches of one size."""
    out: dict[str, Statistics] = {}
    for start in range(0, len(names), _BATCH):
        part = names[start : start + _BATCH]
        with futures.ThreadPoolExecutor() as pool:
            images = [*pool.map(lambda name: _read(folder / name), part)]
        images += images[-1:] * (_BATCH - len(part))
        for name in FILTERS:
            new = statistics(_embed(net, images, name)[: len(part)])
            out[name] = merge(out[name], new) if name in out else new
    return out


def _size(file: epath.Path) -> int:
    try:
        return files.size(file)
    except OSError as error:
        raise DataError(
            f"{file}: expected a reference image; got {error}: unpack the data set again"
        ) from error


def _read(file: epath.Path) -> np.ndarray:
    """The pixels as clean-fid reads them: without color profile and orientation."""
    try:
        return np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{file}: expected a reference image; got {error}: unpack the data set again"
        ) from error


def _write_references(file: epath.Path, refs: References) -> None:
    arrays = {
        f"{name}/{field}": np.asarray(value)
        for name, x in refs.statistics.items()
        for field, value in (
            ("count", x.count),
            ("mean", x.mean),
            ("scatter", x.scatter),
            ("halves", refs.halves[name]),
        )
    }
    out = io.BytesIO()
    np.savez(out, allow_pickle=False, **arrays)
    with files.replacing(file) as part:
        part.write_bytes(out.getvalue())


def _read_references(file: epath.Path, sha256: str) -> References:
    try:
        arrays = dict(np.load(io.BytesIO(file.read_bytes())))
        values = {
            name: Statistics(
                int(arrays[f"{name}/count"]), arrays[f"{name}/mean"], arrays[f"{name}/scatter"]
            )
            for name in FILTERS
        }
        halves = {name: float(arrays[f"{name}/halves"]) for name in FILTERS}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file}: expected statistics of reference images; got {error}: delete the file"
        ) from error
    return References(values, halves, sha256)


# --- the score


def score(features: dict[str, Float32[np.ndarray, "N D"]], refs: References) -> dict[str, Any]:
    """FID of generated images in all variants.

    Args: features: of `extractor`, of all images.
    Returns:
      fid_janus, fid_gigagan, fid_bicubic; count: generated images; reference_count;
      reference_halves: of `References`, what two sets of half the size score that differ by chance.
    Raises:
      DataError: non-finite features, or too few images.
    """
    own = {name: statistics(features[f"inception_{name}"]) for name in FILTERS}
    distances = {
        f"fid_{variant}": frechet_distance(own[generated], refs.statistics[reference])
        for variant, (generated, reference) in VARIANTS.items()
    }
    return {
        **distances,
        "count": own["bicubic"].count,
        "reference_count": refs.statistics["bicubic"].count,
        "reference_halves": refs.halves,
    }
