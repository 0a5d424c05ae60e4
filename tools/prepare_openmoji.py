"""Prepares the quick start's data set: OpenMoji drawings in eight colors, with captions.

    python tools/prepare_openmoji.py --out data/openmoji

Renders about 7,000 images and writes them as ArrayRecord files, through tensorflow-datasets but
without TensorFlow. Then it encodes the training images with the frozen VAE and SigLIP of `starts/`
into `OUT/cache`, which configs/emoji.py reads. It takes one to two minutes. The drawings are CC
BY-SA 4.0; the credits are written beside them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.openmoji import build

STARTS = Path(__file__).resolve().parents[1] / "starts"
SIZE = 64  # of the quick start's images


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", default="data/openmoji", help="folder to create, on a disk")
    p.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    p.add_argument(
        "--new-classes",
        action="store_true",
        help="40 drawings that the quick start does not have, for fine-tuning it",
    )
    p.add_argument(
        "--views",
        type=int,
        default=build.TRAIN_VIEWS,
        help="training images per class and color; more of them made starts/emoji_llm",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the data set in --out")
    args = p.parse_args()
    out = files.resolve(args.out)
    if files.is_remote(out):  # tfds writes array_record to disks only
        raise DataError(f"--out: expected a folder on a disk; got {out}: make it there and copy it")
    counts = build.build(Path(out), args.size, args.overwrite, args.new_classes, args.views)
    for split, count in counts.items():
        print(f"{out} {split}: {count:,} images")
    print(f"credits in {out / 'CREDITS.txt'}", flush=True)
    if (args.size, args.views) == (SIZE, build.TRAIN_VIEWS) and not args.new_classes:
        cache_features(Path(out))


def cache_features(data: Path) -> None:
    """Writes `cache/generate` and `cache/understand` of the training images into the data set."""
    from tools import cache_latents  # JAX, which takes seconds to import

    models = [str(STARTS / name) for name in ("emoji_vae", "emoji_llm")]
    for task, *options in (("generate", "--features"), ("understand",)):
        folder = ["--data", str(data), "--out", str(data / "cache" / task), "--task", task]
        cache_latents.main([*folder, *options, "--model", *models, "--batch", "32"])


if __name__ == "__main__":
    cli.run(main)
