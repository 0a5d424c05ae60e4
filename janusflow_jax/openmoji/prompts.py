"""The quick start's prompt sheet, and the colors that its captions name."""

from __future__ import annotations

from janusflow_jax.config import stages

PALETTE = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 52.0,
    "green": 120.0,
    "cyan": 185.0,
    "blue": 225.0,
    "purple": 275.0,
    "pink": 325.0,
}
"""Color name -> hue in degrees. Captions use these names only."""

PROMPTS = stages.OPENMOJI_PROMPTS

SHEET = tuple(
    (color, name, i % 3 < 2)
    for i, (_, color, name) in enumerate(prompt.split(maxsplit=2) for prompt in PROMPTS)
)
"""(color, class name, whether training sees the pair) of each prompt."""


def caption(color: str, name: str) -> str:
    """The caption in the form of the sheet's prompts: 'a red apple'."""
    article = "an" if color[0] in "aeiou" else "a"
    return f"{article} {color} {name}"
