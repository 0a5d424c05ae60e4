"""What stands in a row's image slots: pictures, or what a cache holds in their place.

    images         uint8[N, H, W, 3]   N slots: those of the tasks whose encoders run
    latent_mean    [Kg, h, w, C]       where generation is cached: the VAE does not run
    latent_logvar  [Kg, h, w, C]
    repa_target    [Kg, S, E]          where its features are, too: nor does SigLIP for REPA
    und_features   [Ku, S, E]          where understanding is cached: nor does SigLIP for reading

Which arrays there are is a matter of the config and its caches, the same for every row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from janusflow_jax.config import UNDERSTAND, DataConfig, ModelConfig
from janusflow_jax.data import cache as latent_cache, images

CROP = 2  # purpose of a random number; `rows` has the others
Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slots:
    """Makes and fills the slots of rows. A task is cached by all of its sources or by none."""

    cfg: DataConfig
    model: ModelConfig
    gen: latent_cache.Manifest | None  # of every generation source
    und: latent_cache.Manifest | None  # of every understanding source
    repa: bool  # whether the loss reads SigLIP's features of generation slots

    @functools.cached_property
    def repa_cached(self) -> bool:
        found = self.gen is not None and bool(self.gen.siglip) and self.cfg.cached_features
        return self.repa and found

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
    def pictures(self) -> tuple[int, int]:
        """(slots of `images`, number of understanding's first slot among them)."""
        needs_gen = self.gen is None or (self.repa and not self.repa_cached)
        gen = self.cfg.gen_slots if needs_gen else 0
        und = self.cfg.und_slots if self.und is None else 0
        return max(gen, und), max(gen, und) - und

    def empty(self) -> Values:
        """The arrays of a row without pictures."""
        count, side = self.cfg.num_slots, self.model.image_size
        out = {
            "images": np.zeros((self.pictures[0], side, side, 3), np.uint8),
            "slot_start": np.zeros(count, np.int32),
            "slot_task": np.zeros(count, np.int32),
        }
        return out | {n: np.zeros(shape, dtype) for n, (shape, dtype) in self.cached.items()}

    def load(
        self,
        task: int,
        cache: latent_cache.Cache | None,
        record: int,
        encoded: Sequence[Any],
        key: tuple[int, int, int],
    ) -> list[Values]:
        """What one slot each of a sample's pictures holds.

        Args:
          task: GENERATE or UNDERSTAND.
          cache: of the sample's source.
          record: its number in the data set.
          encoded: the sample's pictures, as the record has them.
          key: (seed, row, slot of the first picture).
        Raises:
          DataError, DataError: a picture, or what is cached of it, is bad.
        """
        if task == UNDERSTAND:
            if cache is not None:
                return [{"und_features": x} for x in cache.features(record, 0, encoded)]
            return [{"images": whole(x, self.model.image_size)} for x in encoded]
        keys = [(*key[:2], key[2] + i, CROP) for i in range(len(encoded))]
        return [self._generate(cache, record, x, k) for x, k in zip(encoded, keys, strict=True)]

    def put(self, out: Values, task: int, slot: int, start: int, values: Values) -> None:
        """Fills a slot.

        Args: slot: its number among its task's; start: the position where it begins.
        """
        first = self.cfg.num_slots - self.cfg.und_slots if task == UNDERSTAND else 0
        out["slot_start"][first + slot] = start
        out["slot_task"][first + slot] = task
        for name, value in values.items():
            of_images = name == "images" and task == UNDERSTAND
            out[name][slot + (self.pictures[1] if of_images else 0)] = value

    def _generate(
        self, cache: latent_cache.Cache | None, record: int, encoded: Any, key: tuple[int, ...]
    ) -> Values:
        size = self.model.image_size
        if cache is None:
            return {"images": images.for_generation(to_crop(encoded, size), size, key)}
        crop = int(np.random.default_rng(key).integers(cache.manifest.crops))
        mean, logvar = cache.latents(record, crop, encoded)
        out = {"latent_mean": mean, "latent_logvar": logvar}
        if self.repa_cached:
            (out["repa_target"],) = cache.features(record, crop, [encoded])
        elif self.repa:
            out["images"] = cache.pixels(record, crop, to_crop(encoded, size))
        return out


def whole(encoded: bytes, size: int) -> np.ndarray:
    """A picture to read, uint8[size, size, 3]."""
    return images.for_understanding(images.open_image(encoded, long=images.GAP * size), size)


def to_crop(encoded: bytes, size: int) -> Any:
    """A picture to cut a square of `size` from."""
    return images.open_image(encoded, short=images.GAP * size)


def problems(
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
        bad = ["the pictures of this data set; got those of another"]
    return [f"{name}: cache {cache.folder}: expected {x}: make the cache again" for x in bad]


def agree(caches: Sequence[latent_cache.Cache], features: bool) -> list[str]:
    """Every reason why caches of one task's sources cannot stand in one batch."""
    bad = []
    names = ("dtype", "vae", "siglip") if features else ("dtype", "vae")
    for name in names:
        if len({getattr(c.manifest, name) for c in caches}) > 1:
            listed = ", ".join(f"{c.folder}: {getattr(c.manifest, name) or 'none'}" for c in caches)
            bad.append(f"caches: expected one {name}; got {listed}: make them alike")
    return bad
