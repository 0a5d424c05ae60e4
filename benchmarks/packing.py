"""How full the packed rows of a mixture are: `python benchmarks/packing.py`.

The paper's second mixture, 14:80:6 by positions, in rows of 4,096 with the slots of 384 px (577
positions). The records are synthetic. Their lengths come from log-normal distributions with means
of 80 tokens for prompts and 200 for understanding conversations, and, for text, a long tail that
has to be cut. Prints the histogram of lengths, then the share of positions that are not padding.
"""

from __future__ import annotations

import argparse
import functools
import io
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from janusflow_jax import config as c
from janusflow_jax.data import chat_format, rows, sources

HUB = pathlib.Path(__file__).parents[1] / "starts" / "emoji_llm" / "hub"
WORD = "red"  # one token, with its space
MEAN = {"generate": 70, "understand": 150, "text": 900}  # words; the chat format adds tokens
SPREAD = {"generate": 0.7, "understand": 0.6, "text": 1.2}  # sigma of the logarithm
WEIGHTS = {"understand": 14.0, "generate": 80.0, "text": 6.0}


@functools.cache
def image() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(out, "PNG")
    return out.getvalue()


class SyntheticSource:
    """Random-access records of one task; the length of each is drawn from its number."""

    def __init__(self, task: str, count: int):
        self.task, self.count = task, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        sigma = SPREAD[self.task]
        rng = np.random.default_rng((i, len(self.task)))
        mean = np.log(MEAN[self.task]) - sigma**2 / 2
        words = " ".join([WORD] * max(1, int(rng.lognormal(mean, sigma))))
        if self.task == "text":
            return {"id": str(i), "text": words}
        return {"id": str(i), "image": image(), "captions": [words]}


def open_rows(count: int, folder: str) -> rows.Rows:
    """The mixture with `count` records per source; lengths are stored in `folder`."""
    sources.open_source = lambda path, split: SyntheticSource(pathlib.Path(path).name, count)  # type: ignore
    model = c.model_config("1p3b")
    chat = chat_format.ChatFormat.load(HUB, model.num_image_tokens)
    mixture = tuple(
        c.SourceConfig(name=task, path=f"{folder}/{task}", task=task, weight=weight)
        for task, weight in WEIGHTS.items()
    )
    cfg = c.DataConfig(sources=mixture, drop_prompt=0.0)
    return rows.Rows(cfg, model, chat)


def used_share(packed: rows.Rows, count: int) -> float:
    """Share of the positions of the first `count` rows that belong to a sample."""
    return float(np.mean([(packed.row(r)[0]["segment_ids"] > 0).mean() for r in range(count)]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--records", type=int, default=20_000, help="per source")
    p.add_argument("--rows", type=int, default=400)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        packed = open_rows(args.records, folder)
        seconds = time.perf_counter() - start
        print(f"measured and packed 3 x {args.records:,} records in {seconds:.0f} s")
        edges = [0, 50, 100, 200, 400, 800, 1600, 4096]
        print(f"{'text tokens':12}" + "".join(f"{f'<{e}':>8}" for e in edges[1:]) + "    mean")
        for source in packed.sources:
            samples = source.bins.samples
            text = samples.length - np.multiply(samples.images, packed.model.slot_len, dtype=int)
            share = np.histogram(text, edges)[0] / len(text)
            cells = "".join(f"{x:8.1%}" for x in share)
            print(f"{source.name:12}{cells}  {text.mean():6.0f}")
        print(packed.summary(packed.mixtures[0]))
        share = used_share(packed, args.rows)
        print(f"{share:.2%} of the positions of {args.rows} rows are used")


if __name__ == "__main__":
    main()
