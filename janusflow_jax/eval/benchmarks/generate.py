"""Generates the images of a benchmark into the folders that its scorer reads.

    out/images/...             the images, PNG: other formats change scores
    out/manifest/              settings.json; a mark of each batch: images, seeds, checksums
    out/manifest/000012.*.npz  features of the images of batch 12, where they were asked for

Image j of prompt number i has the seed `first + i * images_per_prompt + j`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from PIL import Image

from janusflow_jax import pipeline
from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files as config_files
from janusflow_jax.config.errors import ConfigError, DataError, DivergedError
from janusflow_jax.eval.benchmarks import plan
from janusflow_jax.eval.benchmarks.prompts import Prompt
from janusflow_jax.eval.benchmarks.registry import Benchmark
from janusflow_jax.sampling import inputs

IMAGES, MANIFEST = "images", "manifest"
SOLVER = ("num_steps", "order", "shift", "guidance_interval")
"""Arguments of `Pipeline.generate` that say how an image is computed."""
GRID = 4
"""Tiles of an image file in layout `dpg`: two rows of two, one for each image of the prompt."""


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Computes features of images; those of an image depend on no other image."""

    name: str  # of the networks and their weights; part of the names of stored files
    compute: Callable[[UInt8[np.ndarray, "B H W 3"]], dict[str, Float32[np.ndarray, "B D"]]]


def image_file(layout: str, prompt: Prompt, image: int) -> str:
    """Where an image of a prompt goes, below `images/`."""
    if layout == "geneval":
        return f"{prompt.id}/samples/{image:05d}.png"
    if layout == "by_category":
        return f"{prompt.record['category']}/{prompt.id}.png"
    return f"{prompt.id}.png"


def check_batch_size(benchmark: Benchmark, size: int) -> None:
    """Raises ConfigError: a batch that the programs would round up, or that would cut a grid."""
    least = GRID if benchmark.layout == "dpg" else 1
    sizes = [n for n in (1, 2, 4, 8, 16) if least <= n <= pipeline.MAX_BATCH]
    if size not in sizes:
        raise ConfigError(f"--batch: expected one of {sizes} for {benchmark.name}; got {size}")


def run(
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    model: pipeline.Pipeline,
    out: epath.Path,
    settings: dict[str, Any],
    shard: tuple[int, int] = (0, 1),
    extractor: Extractor | None = None,
) -> Iterator[tuple[int, int]]:
    """Generates the images of this process that are not there yet.

    Args:
      settings: all that the images depend on (`plan.Manifest`), among them guidance_scale,
        those of SOLVER, seed and batch.
      shard: as of `plan.shard`.
      extractor: of features to store beside the marks.
    Yields:
      images of this process that are done, and all of them: at first, and after each batch.
    Raises:
      ConfigError: `out` has a run with other settings.
      JanusFlowError: a prompt that is too long.
    """
    units = [(p, j) for p in prompts for j in range(benchmark.images_per_prompt)]
    ids = model.prompt_ids([p.text for p, _ in units])
    batches = plan.batches([inputs.length_bucket(len(x)) for x in ids], settings["batch"])
    mine = [b for b in batches if b.index % shard[1] == shard[0]]
    manifest = plan.Manifest(out / MANIFEST, settings)
    marks = manifest.marks()
    todo = [b for b in mine if b.index not in marks or not _are_there(out, marks[b.index])]
    total = sum(b.count for b in mine)
    done = total - sum(b.count for b in todo)
    yield done, total
    for batch in todo:
        rows = [units[n] for n in batch.rows]
        images = _generate(model, benchmark, rows, settings)
        sums = _write(benchmark, rows[: batch.count], images[: batch.count], out / IMAGES)
        if extractor and sums:
            features = extractor.compute(_stacked(images))
            file = _features_file(out, batch.index, extractor)
            _store_features(file, features, [x is not None for x in images[: batch.count]])
        manifest.commit(batch.index, _record(benchmark, rows[: batch.count], settings, sums))
        done += batch.count
        yield done, total


def _are_there(out: epath.Path, mark: dict[str, Any]) -> bool:
    """Whether the files of a mark still exist. `read` compares their contents too."""
    return all((out / IMAGES / name).exists() for name in mark["files"])


def _seed(benchmark: Benchmark, prompt: Prompt, image: int, first: int) -> int:
    return first + prompt.number * benchmark.images_per_prompt + image


def _generate(
    model: pipeline.Pipeline,
    benchmark: Benchmark,
    rows: Sequence[tuple[Prompt, int]],
    settings: dict[str, Any],
) -> list[np.ndarray | None]:
    """uint8[H, W, 3] of each row, or None for a non-finite image."""
    try:
        images = model.generate(
            [p.text for p, _ in rows],
            guidance_scale=settings["guidance_scale"],
            **{name: settings[name] for name in SOLVER},
            seed=[_seed(benchmark, p, j, settings["seed"]) for p, j in rows],
            output="numpy",
        )
    except DivergedError as error:
        images = error.images
    return list(images)


def _write(
    benchmark: Benchmark,
    units: Sequence[tuple[Prompt, int]],
    images: Sequence[np.ndarray | None],
    folder: epath.Path,
) -> dict[str, str]:
    """Writes images and what the scorer reads beside them; SHA-256 of each file.

    A file with a non-finite image is not written.
    """
    tiles: dict[str, list[np.ndarray | None]] = {}
    contents: dict[str, bytes] = {}
    for (prompt, j), image in zip(units, images, strict=True):
        tiles.setdefault(image_file(benchmark.layout, prompt, j), []).append(image)
        if benchmark.layout == "geneval" and j == 0:
            contents[f"{prompt.id}/metadata.jsonl"] = json.dumps(prompt.record).encode()

    def write(name: str) -> str:
        data = contents.get(name) or _png(tiles[name])
        # A suffix: to look for what killed processes left, it would list the folder each time.
        with config_files.replacing(folder / name, suffix="image") as part:
            part.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    names = [*contents, *(name for name, x in tiles.items() if all(t is not None for t in x))]
    with futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(write, names), strict=True))


def _png(tiles: Sequence[Any]) -> bytes:
    """One image, or four as two rows of two."""
    pixels = tiles[0]
    if len(tiles) == GRID:
        pixels = np.concatenate([np.concatenate(tiles[i : i + 2], axis=1) for i in (0, 2)])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _record(
    benchmark: Benchmark,
    units: Sequence[tuple[Prompt, int]],
    settings: dict[str, Any],
    sums: dict[str, str],
) -> dict[str, Any]:
    """The mark of a batch. An image whose file was not written has the file None."""
    images = []
    for prompt, j in units:
        name = image_file(benchmark.layout, prompt, j)
        images.append(
            {
                "id": prompt.id,
                "image": j,
                "prompt": prompt.text,
                "seed": _seed(benchmark, prompt, j, settings["seed"]),
                "file": name if name in sums else None,
            }
        )
    return {"images": images, "files": sums}


# --- features


def _stacked(images: Sequence[np.ndarray | None]) -> np.ndarray:
    """uint8[B, H, W, 3], black in place of None."""
    shape = next(x.shape for x in images if x is not None)
    return np.stack([np.zeros(shape, np.uint8) if x is None else x for x in images])


def _store_features(
    file: epath.Path, features: dict[str, np.ndarray], finite: Sequence[bool]
) -> None:
    """Writes the features of the images that are finite; rows after them repeat others."""
    rows = np.flatnonzero(finite)
    data = io.BytesIO()
    arrays: dict[str, Any] = {n: np.asarray(x, np.float32)[rows] for n, x in features.items()}
    np.savez(data, **arrays)
    with config_files.replacing(file, suffix="features") as part:
        part.write_bytes(data.getvalue())


def _features_file(out: epath.Path, index: int, extractor: Extractor) -> epath.Path:
    return plan.mark_file(out / MANIFEST, index).with_suffix(f".{extractor.name}.npz")


def read_features(
    out: epath.Path, extractor: Extractor, size: int
) -> dict[str, Float32[np.ndarray, "N D"]]:
    """Features of all images of a run that have a file, in the order of `read`.

    Those that were not stored are computed from the files and stored.

    Args: size: images to compute at a time, those of a batch.
    """
    parts = []
    for index, mark in plan.read_marks(out / MANIFEST).items():
        names = [x["file"] for x in mark["images"] if x["file"]]
        file = _features_file(out, index, extractor)
        if names and not file.exists():
            images = np.stack([_pixels(out / IMAGES / name) for name in names])
            features = extractor.compute(inputs.fill(images, size))
            _store_features(file, features, [True] * len(names))
        if names:
            parts.append(dict(np.load(io.BytesIO(file.read_bytes()))))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _pixels(file: epath.Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("RGB"))


# --- reading a run


def read(out: epath.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of a complete run and its images, in the order of the plan.

    Raises:
      DataError: no run, images that are not generated yet, or files that are missing or changed.
    """
    settings = plan.read_settings(out / MANIFEST)
    marks = plan.read_marks(out / MANIFEST).values()
    images = [image for mark in marks for image in mark["images"]]
    if len(images) != settings["images"]:
        raise DataError(
            f"{out}: expected {settings['images']} images; got {len(images)}: run the command "
            "without --stage again, which generates the rest"
        )
    sums = {name: sha256 for mark in marks for name, sha256 in mark["files"].items()}

    def problem(name: str) -> str:
        file = out / IMAGES / name
        if not file.exists():
            return f"{file}: expected an image of this run; it is missing"
        if checksums.file_sha256(file) != sums[name]:
            return f"{file}: expected the image that this run wrote; got another: remove it"
        return ""

    with futures.ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, sums) if text]
    if problems:
        raise DataError(
            f"{problems[0]}{f' ({len(problems)} such files)' if problems[1:] else ''}: run the "
            "command without --stage again, which generates it"
        )
    return settings, images
