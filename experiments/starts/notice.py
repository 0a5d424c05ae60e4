"""The README.md of a folder in starts/: what made the weights, and their license."""

from __future__ import annotations

from etils import epath

FILE = "README.md"
TEMPLATE = """\
# {title}

{purpose} Made by

    {command}

The weights were learned from drawings of [OpenMoji](https://openmoji.org) 17 (the open-source emoji
and icon project), recolored and rendered by `tools/prepare_openmoji.py`. They have the license of
the drawings, [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).
"""
START = "Initial weights of the quick start (`configs/emoji.py`)."


def write(folder: epath.PathLike, title: str, command: str, purpose: str = START) -> None:
    """Writes the file into a folder."""
    text = TEMPLATE.format(title=title, purpose=purpose, command=command)
    (epath.Path(folder) / FILE).write_text(text)


def remove(folder: epath.PathLike) -> None:
    """Removes the file, because `save_model` replaces only folders without files of others."""
    (epath.Path(folder) / FILE).unlink(missing_ok=True)
