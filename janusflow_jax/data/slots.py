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
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import cache as latent_cache, images, mixture

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
        has_features = self.gen is not None and bool(self.gen.siglip)
        return self.repa and has_features and self.cfg.cached_features

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
        if self.gen is not None:
            count, dtype = self.cfg.gen_slots, latent_cache.DTYPES[self.gen.dtype]
            out["latent_mean"] = np.zeros((count, *self.model.latent_shape), dtype)
            out["latent_logvar"] = np.zeros((count, *self.model.latent_shape), dtype)
            if self.repa_cached:
                out["repa_target"] = np.zeros((count, *self.gen.feature_shape), dtype)
        if self.und is not None:
            shape = (self.cfg.und_slots, *self.und.feature_shape)
            out["und_features"] = np.zeros(shape, latent_cache.DTYPES[self.und.dtype])
        return out

    def fill(
        self,
        row: Values,
        task: int,
        slot: int,
        starts: Sequence[int],
        encoded: Sequence[bytes],
        cache: latent_cache.Cache | None,
        record: int,
    ) -> None:
        """Writes the images of a sample into a row, all or none.

        Args:
          row: of `empty`, with its number.
          task: of the sample.
          slot: number of the first image's slot in the row.
          starts: the position in the row where each image begins.
          encoded: the images, as the record has them.
          cache: of the sample's source.
          record: its number in the data set.
        Raises:
          DataError: an image, or what is cached of it, is bad.
        """
        if task == UNDERSTAND:
            if cache is not None:
                loaded = [{"und_features": x} for x in cache.features(record, 0, encoded)]
            else:
                loaded = [{"images": whole(x, self.model.image_size)} for x in encoded]
        else:
            seed, number = self.cfg.seed, int(row["row"])
            loaded = [
                self._load_generate(x, cache, record, (seed, number, slot + i))
                for i, x in enumerate(encoded)
            ]
        for n, (start, values) in enumerate(zip(starts, loaded, strict=True), start=slot):
            row["slot_start"][n] = start
            row["slot_task"][n] = task
            for name, value in values.items():
                und_image = name == "images" and task == UNDERSTAND
                row[name][n - self.first(task) + (self.image_slots[1] if und_image else 0)] = value

    def _load_generate(
        self, encoded: bytes, cache: latent_cache.Cache | None, record: int, key: tuple[int, ...]
    ) -> Values:
        size = self.model.image_size
        if cache is None:
            crop = images.for_generation(to_crop(encoded, size), size, (*key, mixture.CROP))
            return {"images": crop}
        crop = int(mixture.generator(key, mixture.CROP).integers(cache.manifest.crops))
        mean, logvar = cache.latents(record, crop, encoded)
        out = {"latent_mean": mean, "latent_logvar": logvar}
        if self.repa_cached:
            (out["repa_target"],) = cache.features(record, crop, [encoded])
        elif self.repa:
            out["images"] = cache.pixels(record, crop, to_crop(encoded, size))
        return out


def whole(encoded: bytes, size: int) -> np.ndarray:
    """An image for understanding, uint8[size, size, 3]."""
    return images.for_understanding(images.open_image(encoded, long=images.GAP * size), size)


def to_crop(encoded: bytes, size: int) -> Image.Image:
    """An image to crop a square of `size` from."""
    return images.open_image(encoded, short=images.GAP * size)


def manifest_of(
    sources: Sequence[Any], task: str, model: ModelConfig, cached_features: bool
) -> latent_cache.Manifest | None:
    """What the caches of a task's sources hold; None where they have no caches.

    Args:
      sources: of the mixture (`rows.Source`).
      cached_features: whether a generation source's features are used.
    Raises:
      DataError: a cache that does not fit its source, the model or the other caches.
    """
    cached = [s for s in sources if s.cache is not None and s.cfg.task == task]
    for source in cached:
        manifest, first = source.cache.manifest, cached[0].cache.manifest
        expected: dict[str, Any] = {
            "task": task,
            "split": source.cfg.split,
            "records": len(source.records),
            "image_size": model.image_size,
            "dtype": first.dtype,
            "vae": first.vae,
        }
        if manifest.vae:
            expected["latent_shape"] = model.latent_shape
        if manifest.siglip:
            expected["feature_shape"] = (model.num_image_tokens, model.und.width)
        if task == "understand" or cached_features:
            expected["siglip"] = first.siglip
        problems = [
            f"{name} {value!r}; got {getattr(manifest, name)!r}"
            for name, value in expected.items()
            if getattr(manifest, name) != value
        ]
        if not problems and latent_cache.fingerprint(source.records) != manifest.pictures:
            problems = ["the images of this data set; got those of another"]
        if problems:
            raise DataError(
                f"{source.name}: cache {source.cache.folder}: expected {', '.join(problems)}: "
                "make the cache again"
            )
    return cached[0].cache.manifest if cached else None
