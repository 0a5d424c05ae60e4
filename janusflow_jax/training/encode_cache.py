"""Computes caches of latents and SigLIP features, and checks that a run may use them.

`data/cache.py` defines the files. Every process writes shards of its own with its own devices, so
processes need not communicate, and a restarted one skips the shards that exist.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax.config import ModelConfig, TrainConfig, parts as parts_lib
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import cache as latent_cache, images, rows, samples, slots, sources
from janusflow_jax.data.cache import Manifest
from janusflow_jax.models import encode, siglip, vae
from janusflow_jax.parallel import processes, trees

Encode = Callable[[Any], dict[str, jax.Array]]
VAE_ENCODER = ("encoder", "quant_conv")
"""The parts of a VAE that latents depend on: a cache survives a change of decoder."""


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Parameters of the encoders; None: the cache holds no such values."""

    cfg: ModelConfig
    vae: Any
    siglip: Any


@dataclasses.dataclass
class Report:
    """What a process did."""

    shards: int = 0
    skipped_shards: int = 0  # existed
    images: int = 0  # encoded
    bad: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One entry of a shard: pixels for the encoders, or the bytes that stand for them."""

    crcs: list[int]  # of the encoded images
    pixels: list[np.ndarray]
    done: bytes = b""


def plan(
    records: Any,
    encoders: Encoders,
    *,
    task: str,
    split: str,
    crops: int,
    seed: int,
    dtype: str,
    computed_in: str,
    shard_records: int,
) -> Manifest:
    """The manifest of the cache that these encoders would compute."""
    cfg, und = encoders.cfg, encoders.cfg.und
    has_vae, has_siglip = encoders.vae is not None, encoders.siglip is not None
    return Manifest(
        task=task,
        split=split,
        records=len(records),
        pictures=latent_cache.fingerprint(records),
        image_size=cfg.image_size,
        crops=crops,
        seed=seed,
        dtype=dtype,
        computed_in=computed_in,
        shard_records=shard_records,
        vae=vae_digest(encoders.vae) if has_vae else "",
        siglip=siglip_digest(cfg, encoders.siglip) if has_siglip else "",
        latent_shape=cfg.latent_shape if has_vae else (),
        feature_shape=(und.num_tokens, und.width) if has_siglip else (),
    )


def vae_digest(params: Any) -> str:
    """Digest of the parameters that cached latents, which are not scaled yet, depend on."""
    return trees.digest({name: params[name] for name in VAE_ENCODER if name in params})


def siglip_digest(cfg: ModelConfig, params: Any) -> str:
    """Digest of what features depend on."""
    params_digest = trees.digest(params)
    if cfg.und.act == "gelu":  # the only one before there was a choice
        return params_digest
    return hashlib.sha256(f"{params_digest} {cfg.und.act}".encode()).hexdigest()


def make_encode(encoders: Encoders, manifest: Manifest, devices: list[Any]) -> Encode:
    """The encoders, jitted: uint8[B, H, W, 3] split over `devices` -> {kind: [B, ...]}.

    Values are 'latents' [B, 2, h, w, C] (mean, log-variance) and 'features' [B, S, E].
    """
    compute, stored = jnp.dtype(manifest.computed_in), latent_cache.DTYPES[manifest.dtype]
    mesh = Mesh(np.array(devices), ("batch",))
    whole = NamedSharding(mesh, P())
    params = jax.device_put({"vae": encoders.vae, "siglip": encoders.siglip}, whole)

    # Without it a TPU or GPU multiplies float32 with fewer digits.
    @jax.default_matmul_precision("highest")
    def run(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        x, out = encode.to_float(pixels, compute), {}
        if encoders.vae is not None:
            module = vae.Vae(encoders.cfg.vae, compute)
            mean_and_logvar = module.apply({"params": params["vae"]}, x, method="encode")
            out["latents"] = jnp.stack(mean_and_logvar, axis=1).astype(stored)
        if encoders.siglip is not None:
            module = siglip.Siglip(encoders.cfg.und, compute)
            out["features"] = module.apply({"params": params["siglip"]}, x).astype(stored)
        return out

    split = NamedSharding(mesh, P("batch"))
    jitted = jax.jit(run, in_shardings=(whole, split), out_shardings=split)
    return lambda pixels: jitted(params, jax.device_put(pixels, split))


def build(
    records: Any,
    folder: Any,
    manifest: Manifest,
    encode: Encode,
    *,
    batch: int,
    process: int = 0,
    num_processes: int = 1,
    workers: int = 4,
    log: Callable[[str], None] = print,
) -> Report:
    """Writes the shards of one process that do not exist yet.

    Args:
      records: the open data set.
      encode: of `make_encode`.
      batch: images that `encode` takes at a time.
      process: writes shards process, process + num_processes, ...
      workers: threads that decode images.
    Raises:
      DataError: the folder holds another cache, or the store cannot be read.
    """
    latent_cache.create(folder, manifest)
    mine = range(process, manifest.num_shards, num_processes)
    todo = [k for k in mine if not latent_cache.is_done(folder, manifest, k)]
    report = Report(skipped_shards=len(mine) - len(todo))
    if report.skipped_shards:
        log(f"{report.skipped_shards} of {len(mine)} shards exist already")
    began = time.perf_counter()
    with futures.ThreadPoolExecutor(workers) as pool:
        for k in todo:
            tasks = (pool.submit(_entries, records, manifest, i) for i in manifest.shard_range(k))
            decoded = (task.result() for task in _ahead(tasks, 2 * workers))
            with latent_cache.shard_writers(folder, manifest, k) as writers:
                for entries in _encoded(decoded, encode, batch, manifest, report):
                    for kind, writer in writers.items():
                        for entry in entries:
                            writer.write(entry[kind])
            report.shards += 1
            seconds = time.perf_counter() - began
            minutes_left = seconds / report.shards * (len(todo) - report.shards) / 60
            log(
                f"{report.shards} of {len(todo)} shards, {report.images / seconds:.1f} images/s, "
                f"{len(report.bad)} bad records, {minutes_left:.0f} min left"
            )
    return report


def _ahead(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items in order; `count` more are begun before one is waited for."""
    begun: collections.deque[Any] = collections.deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


def _entries(records: Any, manifest: Manifest, i: int) -> list[_Entry]:
    """A record's entries: one for each crop, or one for all its images."""
    try:
        encoded = samples.images_of(records[i])
        if not encoded:
            raise DataError("expected an image; the record has none")
        if manifest.task == "understand":
            pixels = [slots.whole(x, manifest.image_size) for x in encoded]
            return [_Entry([zlib.crc32(x) for x in encoded], pixels)]
        crc, image = zlib.crc32(encoded[0]), slots.to_crop(encoded[0], manifest.image_size)
    except DataError as e:
        if e.reason == sources.UNREADABLE:
            raise
        return [_Entry([], [], latent_cache.bad_entry(str(e)))] * manifest.crops
    out = []
    for crop in range(manifest.crops):
        if crop and image.width == image.height:
            out.append(_Entry([], [], latent_cache.same_entry()))
            continue
        key = latent_cache.crop_key(manifest.seed, i, crop)
        out.append(_Entry([crc], [images.for_generation(image, manifest.image_size, key)]))
    return out


def _encoded(
    decoded: Iterator[list[_Entry]], encode: Encode, batch: int, manifest: Manifest, report: Report
) -> Iterator[list[dict[str, bytes]]]:
    """For each record its entries as they are written: kind -> bytes."""
    first, second = itertools.tee(decoded)  # batches read ahead of the records that they belong to
    values = _in_batches((x for r in first for e in r for x in e.pixels), encode, batch)
    for record in second:
        out = []
        for entry in record:
            encoded = [next(values) for _ in entry.pixels]
            report.images += len(encoded)
            out.append(
                {
                    kind: entry.done
                    or latent_cache.entry(entry.crcs, [x[kind] for x in encoded], manifest.dtype)
                    for kind in manifest.shapes
                }
            )
        if record[0].done:
            report.bad.append(latent_cache.reason(record[0].done))
        yield out


def _in_batches(
    pixels: Iterator[np.ndarray], encode: Encode, batch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Each image's values, in order. One batch is on the device while the next is decoded."""

    def begin() -> Iterator[tuple[int, dict[str, jax.Array]]]:
        while some := list(itertools.islice(pixels, batch)):
            padded = np.zeros((batch, *some[0].shape), np.uint8)  # always one shape
            padded[: len(some)] = some
            yield len(some), encode(padded)

    for count, out in _ahead(begin(), 1):
        host = {kind: np.asarray(x) for kind, x in out.items()}
        if names := trees.non_finite(host):
            raise DataError(
                f"the encoders' {names[0]}: {trees.NON_FINITE}: set --compute-dtype float32, or "
                "check the model"
            )
        for i in range(count):
            yield {kind: x[i] for kind, x in host.items()}


def digests(cfg: TrainConfig, made: rows.Rows, read: Callable[[str], trees.Tree]) -> dict[str, str]:
    """Part -> digest of each SigLIP that the caches of a mixture must come from.

    Args: read: gives a part in float32 on the host.
    """
    parts = {"und_encoder"} if made.slots.und is not None else set()
    if made.slots.repa_cached:
        parts.add(_target(cfg))
    return {part: siglip_digest(cfg.model, read(part)) for part in sorted(parts)}


def check(cfg: TrainConfig, made: rows.Rows, encoders: Mapping[str, str], vae_params: Any) -> None:
    """Checks that the caches of a mixture come from this run's encoders.

    Args: encoders: of `digests`; a part that is missing is not compared.
    Raises:
      DataError: caches of other encoders, or of a SigLIP that this run trains.
    """
    gen, und = made.slots.gen, made.slots.und
    folders = {s.cfg.task: s.cfg.cache for s in made.sources if s.cfg.cache}
    pairs = []  # task, encoder, digest in the cache, digest of the run
    if gen is not None:
        pairs.append(("generate", "VAE", gen.vae, vae_digest(vae_params)))
    if gen is not None and made.slots.repa_cached:
        target = _target(cfg)
        if target in map(parts_lib.top, parts_lib.trained_paths(cfg)):
            raise DataError(
                f"cache {folders['generate']}: holds features of a frozen SigLIP, but this run "
                "trains it: set --config.data.cached_features=False (the latents remain valid)"
            )
        pairs.append(("generate", "SigLIP", gen.siglip, encoders.get(target)))
    if und is not None:
        pairs.append(("understand", "SigLIP", und.siglip, encoders.get("und_encoder")))
    for task, encoder, of_cache, of_run in pairs:
        if not of_run:
            processes.log(
                f"cache {folders[task]}: not compared with this run's {encoder}, because the run "
                "did not store its digest"
            )
        elif of_cache != of_run:
            raise DataError(
                f"cache {folders[task]}: expected values of this run's {encoder} ({of_run[:12]}); "
                f"got {of_cache[:12] or 'none'}: run tools/cache_latents.py with the model that "
                "this run starts from"
            )


def _target(cfg: TrainConfig) -> str:
    """The part whose features REPA aligns with (arXiv 2410.06940)."""
    return "repa_target" if cfg.model.repa_target == "siglip" else "und_encoder"
