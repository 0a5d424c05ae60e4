"""A small GenEval for models of the quick start, in the files of the official one.

    python tools/openmoji_geneval.py prompts --out emoji_metadata.jsonl
    python -m janusflow_jax.benchmark geneval --model runs/emoji --data emoji_metadata.jsonl --out O
    python tools/openmoji_geneval.py detect --images O/images --out results.jsonl
    python -m janusflow_jax.benchmark geneval --out O --results results.jsonl

The project's judge takes the place of the official detector: the score is not GenEval's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.config import files
from janusflow_jax.openmoji import geneval, judge as judge_lib


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("action", choices=("prompts", "detect"))
    p.add_argument("--out", required=True, help="the file to write")
    p.add_argument("--images", default="", help="detect: the folder images/ of the run")
    p.add_argument("--judge", default=judge_lib.START)
    args = p.parse_args()
    if bool(args.images) != (args.action == "detect"):
        p.error("--images: expected with detect, and with detect only")
    out = cli.check_writable(args.out, "--out")
    if args.action == "prompts":
        lines = geneval.metadata()
    else:
        lines = geneval.detect(judge_lib.load(args.judge), files.resolve(args.images))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with files.replacing(out) as part:
        part.write_text(text)
    print(out)


if __name__ == "__main__":
    cli.run(main)
