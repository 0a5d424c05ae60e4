"""Prepares the quick start's data set: OpenMoji drawings in eight colours, with captions.

    python tools/prepare_openmoji.py --out data/openmoji

`--tokenizer` also stores the captions' lengths for that tokenizer (a run does it by itself where
they are missing); `--train-tokenizer` trains the quick start's tokenizer into a folder and stops.
Renders about 7,000 pictures and writes them as ArrayRecord through tensorflow-datasets (without
TensorFlow), in under a minute. The drawings are CC BY-SA 4.0: the credits are written beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.data import chat_format, lengths, sources
from janusflow_jax.openmoji import build as openmoji_build, tokenizer as openmoji_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/openmoji"), help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the views and held-out pairs")
    parser.add_argument(
        "--new-classes",
        action="store_true",
        help="40 drawings that the quick start does not have, for fine-tuning it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    parser.add_argument("--contact-sheet", type=Path, help="only draw every class into this PNG")
    parser.add_argument("--tokenizer", help="also store lengths for this tokenizer folder")
    parser.add_argument(
        "--train-tokenizer", type=Path, help="only train the quick start's tokenizer into a folder"
    )
    parser.add_argument("--vocab-size", type=int, default=640, help="of --train-tokenizer")
    args = parser.parse_args()
    start = time.time()
    if args.train_tokenizer:
        tokens = (args.size // 16) ** 2  # SigLIP's patches are 16 pixels wide
        openmoji_tokenizer.train_tokenizer(
            openmoji_build.tokenizer_texts(),
            args.vocab_size,
            args.train_tokenizer,
            tokens,
            args.size,
        )
        print(f"{args.train_tokenizer}: a tokenizer of at most {args.vocab_size} tokens")
        return
    if args.contact_sheet:
        sheet = openmoji_build.contact_sheet(args.seed, args.size, new_classes=args.new_classes)
        sheet.save(args.contact_sheet)
        print(f"{args.contact_sheet}: every class once, in {time.time() - start:.1f} s")
        return
    counts = openmoji_build.build(args.out, args.size, args.seed, args.overwrite, args.new_classes)
    for split, count in counts.items():
        print(f"{args.out} {split}: {count:,} pictures")
    if args.tokenizer:
        chat = chat_format.ChatFormat.load(args.tokenizer)
        source = sources.open_source(args.out, "train")
        for task in ("generate", "understand"):
            lengths.load_lengths(source, str(args.out), "train", task, "chat", chat)
    print(f"done in {time.time() - start:.1f} s; credits in {args.out / 'CREDITS.txt'}")


if __name__ == "__main__":
    cli.run(main)
