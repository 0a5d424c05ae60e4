"""Prepares the quick start's data set: OpenMoji drawings in eight colors, with captions.

    python tools/prepare_openmoji.py --out data/openmoji

Renders about 7,000 images and writes them as ArrayRecord files in under a minute, through
tensorflow-datasets but without TensorFlow. The drawings are CC BY-SA 4.0; the credits are written
beside them. `--train-tokenizer` trains the quick start's tokenizer instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.data import chat_format, packing, sources
from janusflow_jax.openmoji import build, tokenizer


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("data/openmoji"), help="folder to create")
    p.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    p.add_argument("--seed", type=int, default=0, help="of the views and the held-out pairs")
    p.add_argument(
        "--new-classes",
        action="store_true",
        help="40 drawings that the quick start does not have, for fine-tuning it",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    p.add_argument("--contact-sheet", type=Path, help="only draw every class into this PNG")
    p.add_argument(
        "--tokenizer", help="also store caption lengths for this tokenizer (a run does it itself)"
    )
    p.add_argument(
        "--train-tokenizer", type=Path, help="only train the quick start's tokenizer into a folder"
    )
    p.add_argument("--vocab-size", type=int, default=640, help="of --train-tokenizer")
    args = p.parse_args()
    start = time.time()
    if args.train_tokenizer:
        num_image_tokens = (args.size // 16) ** 2  # SigLIP's patches are 16 pixels wide
        texts = build.tokenizer_texts()
        tokenizer.train_tokenizer(
            texts, args.vocab_size, args.train_tokenizer, num_image_tokens, args.size
        )
        print(f"{args.train_tokenizer}: a tokenizer of at most {args.vocab_size} tokens")
        return
    if args.contact_sheet:
        build.contact_sheet(args.seed, args.size, args.new_classes).save(args.contact_sheet)
        print(f"{args.contact_sheet}: every class once, in {time.time() - start:.1f} s")
        return
    counts = build.build(args.out, args.size, args.seed, args.overwrite, args.new_classes)
    for split, count in counts.items():
        print(f"{args.out} {split}: {count:,} images")
    if args.tokenizer:
        chat = chat_format.ChatFormat.load(args.tokenizer)
        source = sources.open_source(args.out, "train")
        for task in ("generate", "understand"):
            packing.load_lengths(source, str(args.out), "train", task, "chat", chat)
    print(f"done in {time.time() - start:.1f} s; credits in {args.out / 'CREDITS.txt'}")


if __name__ == "__main__":
    cli.run(main)
