"""The fixed prompt sheet of the quick start, and the palette its captions name.

Written down before any training: 24 prompts, every colour three times, every class once; the last
prompt of each colour is a (class, colour) pair that no training split holds.
Standard library only.
"""

from __future__ import annotations

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
"""Colour name -> hue in degrees. Captions use these names and no other."""

_TRAINED = {
    "red": ("apple", "heart"),
    "orange": ("pumpkin", "cat"),
    "yellow": ("banana", "moon"),
    "green": ("frog", "tree"),
    "cyan": ("fish", "drop"),
    "blue": ("whale", "book"),
    "purple": ("butterfly", "key"),
    "pink": ("pig", "dress"),
}
_HELD_OUT = {
    "red": "umbrella",
    "orange": "star",
    "yellow": "car",
    "green": "balloon",
    "cyan": "crown",
    "blue": "mushroom",
    "purple": "rocket",
    "pink": "turtle",
}

SHEET = tuple(
    (colour, name, trained)
    for colour in PALETTE
    for name, trained in (
        *((name, True) for name in _TRAINED[colour]),
        (_HELD_OUT[colour], False),
    )
)
"""(colour, class name, whether training saw the pair), in the order of the sheet."""


def article(word: str) -> str:
    """'a' or 'an', as the first letter of the word asks."""
    return "an" if word[0] in "aeiou" else "a"


def caption(colour: str, name: str) -> str:
    """The caption that a prompt of the sheet uses: 'a red apple'."""
    return f"{article(colour)} {colour} {name}"


PROMPTS = tuple(caption(colour, name) for colour, name, _ in SHEET)
"""The 24 prompts, in the order of the sheet."""
