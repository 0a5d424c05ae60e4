"""The image slots of a row: bytes of images, or what a cache holds for them, to arrays.

    images         uint8[N, H, W, 3]   N slots: those of the tasks whose encoders run
    latent_mean    [Kg, h, w, C]       where generation is cached: the VAE does not run
    latent_logvar  [Kg, h, w, C]
    repa_target    [Kg, S, E]          where its features are cached too: no SigLIP for REPA
    und_features   [Ku, S, E]          where understanding is cached: no SigLIP for it

A row has K slots; generation uses the first Kg, understanding the last Ku. Which arrays there are
depends on the config and its caches only, so it is the same for every row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from janusflow_jax.config import UNDERSTAND, DataConfig, ModelConfig
from janusflow_jax.data import cache as latent_cache, images, packing

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slots:
    """Loads and fills the slots of rows. A task is cached by all of its sources or by none."""

    cfg: DataConfig
    model: ModelConfig
    gen: latent_cache.Manifest | None  # of every generation source
    und: latent_cache.Manifest | None  # of every understanding source
    repa: bool  # whether the loss reads SigLIP's features of generation slots

    @functools.cached_property
    def repa_cached(self) -> bool:
        """Whether REPA's targets come from a cache."""
        has_features = self.gen is not None and bool(self.gen.siglip) and self.cfg.cached_features
        return self.repa and has_features

    @functools.cached_property
    def cached(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> shape and dtype of the arrays that come from caches."""
        out: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        if self.gen is not None:
            dtype, count = latent_cache.DTYPES[self.gen.dtype], self.cfg.gen_slots
            for name in ("latent_mean", "latent_logvar"):
                out[name] = (count, *self.model.latent_shape), dtype
            if self.repa_cached:
                out["repa_target"] = (count, *self.gen.feature_shape), dtype
        if self.und is not None:
            shape = (self.cfg.und_slots, *self.und.feature_shape)
            out["und_features"] = shape, latent_cache.DTYPES[self.und.dtype]
        return out

    @functools.cached_property
    def image_slots(self) -> tuple[int, int]:
        """(slots of `images`, number of understanding's first slot among them)."""
        needs_gen = self.gen is None or (self.repa and not self.repa_cached)
        gen = self.cfg.gen_slots if needs_gen else 0
        und = self.cfg.und_slots if self.und is None else 0
        return max(gen, und), max(gen, und) - und

    def first(self, task: int) -> int:
        """Number of a task's first slot in the row."""
        return self.cfg.num_slots - self.cfg.und_slots if task == UNDERSTAND else 0

    def empty(self) -> Values:
        """The arrays of a row without images."""
        count, side = self.cfg.num_slots, self.model.image_size
        out = {
            "images": np.zeros((self.image_slots[0], side, side, 3), np.uint8),
            "slot_start": np.zeros(count, np.int32),
            "slot_task": np.zeros(count, np.int32),
        }
        return out | {n: np.zeros(shape, dtype) for n, (shape, dtype) in self.cached.items()}

    def load(
        self,
        task: int,
        cache: latent_cache.Cache | None,
        record: int,
        encoded: Sequence[bytes],
        key: tuple[int, int, int],
    ) -> list[Values]:
        """What the slots of a sample's images hold, one dict a slot.

        Args:
          task: of the sample.
          cache: of the sample's source.
          record: its number in the data set.
          encoded: the sample's images, as the record has them.
          key: (seed, row, slot of the first image).
        Raises:
          DataError: an image, or what is cached of it, is bad.
        """
        if task != UNDERSTAND:
            seed, row, slot = key
            return [
                self._load_generate(cache, record, x, (seed, row, slot + i))
                for i, x in enumerate(encoded)
            ]
        if cache is not None:
            return [{"und_features": x} for x in cache.features(record, 0, encoded)]
        return [{"images": whole(x, self.model.image_size)} for x in encoded]

    def _load_generate(
        self, cache: latent_cache.Cache | None, record: int, encoded: bytes, key: tuple[int, ...]
    ) -> Values:
        size = self.model.image_size
        if cache is None:
            crop = images.for_generation(to_crop(encoded, size), size, (*key, packing.CROP))
            return {"images": crop}
        number = int(packing.generator(key, packing.CROP).integers(cache.manifest.crops))
        mean, logvar = cache.latents(record, number, encoded)
        out = {"latent_mean": mean, "latent_logvar": logvar}
        if self.repa_cached:
            (out["repa_target"],) = cache.features(record, number, [encoded])
        elif self.repa:
            out["images"] = cache.pixels(record, number, to_crop(encoded, size))
        return out

    def fill(
        self, row: Values, task: int, slot: int, starts: Sequence[int], loaded: Sequence[Values]
    ) -> None:
        """Writes what the slots of a sample hold into a row.

        Args:
          slot: number of the first one in the row.
          starts: the position where each begins.
          loaded: of `load`.
        """
        for n, (start, values) in enumerate(zip(starts, loaded, strict=True), start=slot):
            row["slot_start"][n] = start
            row["slot_task"][n] = task
            for name, value in values.items():
                und_image = name == "images" and task == UNDERSTAND
                row[name][n - self.first(task) + (self.image_slots[1] if und_image else 0)] = value


def whole(encoded: bytes, size: int) -> np.ndarray:
    """An image for understanding, uint8[size, size, 3]."""
    return images.for_understanding(images.open_image(encoded, long=images.GAP * size), size)


def to_crop(encoded: bytes, size: int) -> Image.Image:
    """An image to crop a square of `size` from."""
    return images.open_image(encoded, short=images.GAP * size)


def cache_problems(
    name: str, cache: latent_cache.Cache, records: Any, split: str, task: str, model: ModelConfig
) -> list[str]:
    """Every reason why a source cannot use a cache."""
    m = cache.manifest
    pairs = [
        ("task", task, m.task),
        ("split", split, m.split),
        ("records", len(records), m.records),
        ("image_size", model.image_size, m.image_size),
    ]
    if m.vae:
        pairs.append(("latents of shape", model.latent_shape, m.latent_shape))
    if m.siglip:
        shape = (model.num_image_tokens, model.und.width)
        pairs.append(("features of shape", shape, m.feature_shape))
    bad = [f"{what} {want!r}; got {got!r}" for what, want, got in pairs if want != got]
    if not bad and latent_cache.fingerprint(records) != m.pictures:
        bad = ["the images of this data set; got those of another"]
    return [f"{name}: cache {cache.folder}: expected {x}: make the cache again" for x in bad]


def batch_problems(caches: Sequence[latent_cache.Cache], features: bool) -> list[str]:
    """Every reason why the caches of one task's sources cannot share a batch."""
    bad = []
    names = ("dtype", "vae", "siglip") if features else ("dtype", "vae")
    for name in names:
        if len({getattr(c.manifest, name) for c in caches}) > 1:
            listed = ", ".join(f"{c.folder}: {getattr(c.manifest, name) or 'none'}" for c in caches)
            bad.append(f"caches: expected one {name}; got {listed}: make the caches alike")
    return bad
