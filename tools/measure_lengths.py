"""Measures the captions of a prepared data set for a tokenizer, and stores the lengths beside it.

    python tools/measure_lengths.py --data data/openmoji --split train --task generate \\
        --format chat --tokenizer starts/emoji_llm/hub

A run does this by itself for a small data set; a large one is measured once, with this.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.data import chat_format, lengths, sources


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
        help="a field of the source's `fields` in the config",
    )
    args = parser.parse_args()
    fields = tuple(tuple(pair.split("=", 1)) for pair in args.field)
    chat = chat_format.ChatFormat.load(args.tokenizer)
    opened = sources.open_source(args.data, args.split)
    source = sources.mapped(opened, fields, args.task)
    counted = lengths.measure(source, args.task, args.format, chat)
    file = lengths.lengths_path(args.data, args.split, args.task, args.format, chat, fields)
    lengths.store(file, counted, chat)
    print(
        f"{file}: {len(counted):,} records in {len(counted.first):,} units of "
        f"{counted.first.mean():.1f} tokens, the longest {counted.first.max()}; "
        f"{int((counted.first == 0).sum())} records make no sample"
    )


if __name__ == "__main__":
    cli.run(main)
