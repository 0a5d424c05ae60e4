"""Measures the records of a prepared data set for a tokenizer, and stores the lengths beside it.

    python tools/measure_lengths.py --data data/openmoji --split train --task generate \\
        --format chat --tokenizer starts/emoji_llm/hub

A run measures a small data set itself. A large one must be measured once, with this command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.data import chat_format, packing, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the prepared data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--task", required=True, choices=("generate", "understand", "text"))
    parser.add_argument("--format", required=True, choices=("chat", "plain"))
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer files")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="as in the source's `fields` in the config; may be repeated",
    )
    args = parser.parse_args()
    fields = sources.field_pairs(args.field)
    chat = chat_format.ChatFormat.load(args.tokenizer)
    opened = sources.open_source(args.data, args.split)
    source = sources.mapped(opened, fields, args.task)
    measured = packing.measure_lengths(source, args.task, args.format, chat)
    file = packing.lengths_path(args.data, args.split, args.task, args.format, chat, fields)
    packing.store_lengths(file, measured, chat)
    longest = np.maximum.reduceat(measured.first, measured.offsets[:-1])
    print(
        f"{file}: {len(measured):,} records, whose longest units have {longest.mean():.1f} tokens, "
        f"at most {longest.max()}; {int((longest == 0).sum())} records make no sample"
    )


if __name__ == "__main__":
    cli.run(main)
