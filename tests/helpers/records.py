"""Records of data sets in memory, and a data config and rows made of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from helpers import golden
from janusflow_jax import config as c

HUB = golden.TINY / "janusflow"
"""A folder with a tokenizer."""
MODEL = c.model_config("test")
WORDS = "A red fox sits in the snow beside a quiet river while it rains"


class Store(list):
    """Records in memory. Its repr keeps images out of a failing test's message."""

    def __repr__(self) -> str:
        return f"Store of {len(self)}"


def png(seed: int, shape: tuple[int, int] = (64, 96)) -> bytes:
    """A PNG file of noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def record(i: int) -> dict[str, Any]:
    """An image of noise with three captions and a text, each of its own length."""
    words = WORDS.split()
    return {
        "id": str(i),
        "image": png(i),
        "captions": [" ".join(words[: 1 + (i + j) % 13]) for j in range(3)],
        "text": " ".join(words * (1 + i % 9)),
    }


def source(path: str = "a", **fields) -> c.SourceConfig:
    return c.SourceConfig(path=path, **fields)


MIX = (
    source("a", name="gen", weight=0.5),
    source("b", name="und", task="understand", weight=0.3),
    source("a", name="text", task="text", weight=0.2),
)


def data_config(**fields) -> c.DataConfig:
    defaults = {"sources": MIX, "row_len": 256, "gen_slots": 4, "und_slots": 3, "num_threads": 2}
    return c.DataConfig(**(defaults | fields))


def take(iterator: Iterator, n: int) -> list:
    """The first n items of an iterator that is closed then."""
    out = [next(iterator) for _ in range(n)]
    iterator.close()  # pyright: ignore
    return out
