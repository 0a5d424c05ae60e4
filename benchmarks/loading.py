"""Data-loading throughput per core: `python benchmarks/loading.py --photos FOLDER`.

Two kinds of rows, read from disk: the quick start's rows (64 px, PNG; needs data/openmoji) and
packed rows of 4,096 positions with 6 images of 384 px, from JPEGs rendered in a temporary folder
from real photographs (`--photos`; by default scikit-image's, where it is installed). A third of the
images has a short side of 512 px, a third of 1,024, a third of 2,048.

Rounds alternate between the settings. For each it prints the rows per second of the fastest
round, the least CPU time per row (all threads together) and its inverse, the rows per second and
core; all without the time to start. `--cached` adds rows of latents and features as
tools/cache_latents.py stores them (noise, bfloat16).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import itertools
import pathlib
import resource
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np
from PIL import Image

from janusflow_jax import config as c
from janusflow_jax.data import cache as latent_cache, chat_format, rows, sources

ROOT = pathlib.Path(__file__).parents[1]
HUB = ROOT / "starts" / "emoji_llm" / "hub"
SHORT = (512, 1024, 2048)
CAPTION = "a photograph of something that a caption describes in some twenty words " * 2


def photographs(folder: str) -> list[Image.Image]:
    """Color images of a folder, without icons."""
    if not folder:
        import importlib

        skimage: Any = importlib.import_module("skimage")
        folder = str(pathlib.Path(skimage.__file__).parent / "data")
    files = sorted(p for p in pathlib.Path(folder).iterdir() if p.suffix in (".png", ".jpg"))
    photos = []
    for file in files:
        with Image.open(file) as image:
            if image.mode == "RGB" and min(image.size) >= 300:
                photos.append(image.copy())
    if not photos:
        raise SystemExit(f"{folder}: expected .png or .jpg photographs of 300 px or more")
    return photos


def render(photos: list[Image.Image], i: int) -> bytes:
    """Record i's JPEG: a window of a photograph, at one of the sizes."""
    rng = np.random.default_rng(i)
    photo = photos[i % len(photos)]
    width, height = photo.size
    part = rng.uniform(0.6, 1.0)
    w, h = int(width * part), int(height * part * rng.uniform(0.75, 1.0))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    scale = SHORT[i % len(SHORT)] / min(w, h)
    image = photo.crop((left, top, left + w, top + h))
    image = image.resize((round(w * scale), round(h * scale)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def prepare(folder: pathlib.Path, photos: list[Image.Image], count: int) -> str:
    """A data set of `count` photographs with captions."""
    import tensorflow_datasets as tfds

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Photographs."""

        VERSION = tfds.core.Version("1.0.0")
        url_infos: Any = {}

        def _info(self) -> Any:
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            captions = tfds.features.Sequence(tfds.features.Text())
            features = {"id": tfds.features.Text(), "image": image, "captions": captions}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[Any]:
            for i in range(count):
                jpeg = io.BytesIO(render(photos, i))
                yield i, {"id": str(i), "image": jpeg, "captions": [CAPTION]}

    builder = Photos(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def random_cache(data: str, out: str, model: c.ModelConfig) -> None:
    """A cache of the right shapes: noise, because reading does not care."""
    records = sources.open_source(data, "train")
    manifest = latent_cache.Manifest(
        task="generate",
        split="train",
        records=len(records),
        pictures=latent_cache.fingerprint(records),
        image_size=model.image_size,
        crops=1,
        seed=0,
        dtype="bfloat16",
        computed_in="bfloat16",
        shard_records=256,
        vae="none",
        siglip="none",
        latent_shape=model.latent_shape,
        feature_shape=(model.und.num_tokens, model.und.width),
    )
    latent_cache.create(out, manifest)
    rng = np.random.default_rng(0)
    for k in range(manifest.num_shards):
        with latent_cache.shard_writers(out, manifest, k) as writers:
            for i in manifest.shard_range(k):
                crc = zlib.crc32(records[i]["image"])
                for kind, writer in writers.items():
                    noise = rng.normal(size=manifest.shapes[kind]).astype(np.float32)
                    writer.write(latent_cache.entry([crc], [noise], manifest.dtype))


def quick_start(data: str) -> rows.Rows:
    """The quick start's rows."""
    import runpy

    cfg = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]()
    mixture = tuple(dataclasses.replace(s, path=data) for s in cfg.data.sources)
    chat = chat_format.ChatFormat.load(HUB, cfg.model.num_image_tokens)
    return rows.Rows(dataclasses.replace(cfg.data, sources=mixture), cfg.model, chat)


def packed(data: str, task: str, cache: str = "") -> rows.Rows:
    """Rows of six images at 384 px."""
    model = c.model_config("1p3b")
    chat = chat_format.ChatFormat.load(HUB, model.num_image_tokens)
    source = c.SourceConfig(name=task, path=data, task=task, format="plain", cache=cache)
    slots = {"gen_slots": 6 if task == "generate" else 0, "und_slots": 6 * (task != "generate")}
    return rows.Rows(c.DataConfig(sources=(source,), **slots), model, chat)


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def read(source: rows.Rows, first: int, count: int, threads: int) -> None:
    """Reads rows first .. first + count with threads, as the loader does."""
    with futures.ThreadPoolExecutor(threads) as pool:
        collections.deque(pool.map(source.row, range(first, first + count)), maxlen=0)


def measure(kinds: dict[str, rows.Rows], counts: dict[str, int], rounds: int) -> None:
    """Every setting reads few rows, then many; the difference does not include starting."""
    best: dict[Any, np.ndarray] = {}  # (few, many) x (wall, CPU) seconds
    for n in range(rounds):
        for name, threads in itertools.product(kinds, (1, 2)):
            spent = []
            for count in (counts[name] // 4, counts[name] + counts[name] // 4):
                start, cpu = time.perf_counter(), cpu_seconds()
                read(kinds[name], 1000 * n, count, threads)
                spent.append((time.perf_counter() - start, cpu_seconds() - cpu))
            key = name, threads
            best[key] = np.minimum(best.get(key, np.full((2, 2), 1e9)), spent)
    print(f"{'rows':22}{'threads':>8}{'rows/s':>9}{'ms CPU/row':>12}{'/s core':>9}")
    for (name, threads), (few, many) in best.items():
        n, (wall, used) = counts[name], many - few
        print(f"{name:22}{threads:8}{n / wall:9.1f}{1000 * used / n:12.2f}{n / used:9.1f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--photos", default="", help="folder of photographs")
    p.add_argument("--emoji", default="data/openmoji")
    p.add_argument("--records", type=int, default=120)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--rows", type=int, default=12, help="of six images; 40 times as many of 64 px")
    p.add_argument("--cached", action="store_true")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(pathlib.Path(folder), photographs(args.photos), args.records)
        kinds = {"384 px generate": packed(data, "generate")}
        kinds["384 px understand"] = packed(data, "understand")
        if pathlib.Path(args.emoji).exists():
            kinds = {"quick start": quick_start(args.emoji)} | kinds
        if args.cached:
            cache = f"{folder}/cache"
            random_cache(data, cache, c.model_config("1p3b"))
            kinds["384 px cached"] = packed(data, "generate", cache)
        counts = {n: args.rows * (40 if n == "quick start" else 1) for n in kinds}
        measure(kinds, counts, args.rounds)


if __name__ == "__main__":
    main()
