"""Builds the OpenMoji data set: which image belongs to which split, and the ArrayRecord files.

Splits: `train` (3 views of every trained pair, or as many as asked for), `heldout_views` (1 other
view of every trained pair), `heldout_pairs` (2 views of every (class, color) pair that training
never sees).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.openmoji import classes as classes_lib, drawings as drawings_lib, prompts

TRAIN_VIEWS = 3
HELDOUT_VIEW = 3  # the number of the view; training views leave it out
HELDOUT_PAIR_VIEWS = 2
HELDOUT_PER_COLOR = 24  # classes: every color misses as many
_MODULE_NAME = "janusflow_jax.data.openmoji_build"  # of the first release; it never changes
SEED = 0  # of the views and the held-out pairs
CREDITS = """\
OpenMoji drawings in palette colours

The pictures in this folder are made from the drawings of OpenMoji 17 - the open-source emoji and
icon project (https://openmoji.org), designed by the OpenMoji project's authors.
License of the drawings and of these pictures: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/).
Changes: one fill of each drawing is replaced by a colour of our palette; the drawing is turned by
up to 10 degrees, scaled and shifted, and rendered on white.
Names: this project's.
Made by tools/prepare_openmoji.py.
"""
"""Part of the data set, so its words stay: reports hold a checksum of all files."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One record before rendering."""

    name: str
    color: str
    view: int

    @property
    def id(self) -> str:
        return f"{self.name.replace(' ', '_')}-{self.color}-{self.view}"


def heldout_pairs(names: list[str]) -> set[tuple[str, str]]:
    """The (class, color) pairs that training never sees, the same number for every color.

    Of a class of the sheet, only the pair that the sheet holds out; of every other class at most
    one pair, so every class keeps at least 7 training colors.
    """
    pairs = {(name, color) for color, name, trained in prompts.SHEET if not trained}
    on_sheet = {name for _, name, _ in prompts.SHEET}
    free = [name for name in sorted(names) if name not in on_sheet]
    order = np.random.default_rng(SEED).permutation(len(free))
    colors = list(prompts.PALETTE)
    per_color = min(HELDOUT_PER_COLOR - 1, len(free) // len(colors))
    for i in range(per_color * len(colors)):
        pairs.add((free[order[i]], colors[i % len(colors)]))
    return pairs


def split_items(names: list[str], train_views: int = TRAIN_VIEWS) -> dict[str, list[Item]]:
    """Every record of every split, in a fixed order."""
    numbers = [v for v in range(train_views + 1) if v != HELDOUT_VIEW]
    heldout = heldout_pairs(names)
    splits: dict[str, list[Item]] = {"train": [], "heldout_pairs": [], "heldout_views": []}
    for name in names:
        for color in prompts.PALETTE:
            if (name, color) in heldout:
                splits["heldout_pairs"] += [Item(name, color, v) for v in range(HELDOUT_PAIR_VIEWS)]
            else:
                splits["train"] += [Item(name, color, v) for v in numbers[:train_views]]
                splits["heldout_views"].append(Item(name, color, HELDOUT_VIEW))
    return splits


def view_of(item: Item) -> drawings_lib.View:
    """A small rotation, scale and shift that depends on the item's id."""
    key = int.from_bytes(item.id.encode(), "big")
    generator = np.random.default_rng([SEED, key % 2**63, key >> 63])
    return drawings_lib.View(
        angle=float(generator.uniform(-10, 10)),
        scale=float(generator.uniform(0.8, 1.0)),
        shift_x=float(generator.uniform(-3, 3)),
        shift_y=float(generator.uniform(-3, 3)),
    )


def render_item(drawing: drawings_lib.Drawing, item: Item, size: int) -> bytes:
    """The record's image, PNG with three channels."""
    png = drawings_lib.render(drawing.recolored(item.color), view_of(item), size)
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "PNG", compress_level=6)
    return out.getvalue()


def build(
    out: Path,
    size: int = 64,
    overwrite: bool = False,
    new_classes: bool = False,
    train_views: int = TRAIN_VIEWS,
) -> dict[str, int]:
    """Renders all images and writes the data set; an interrupted build leaves `out` unchanged.

    The data set is an ArrayRecord data set of tensorflow-datasets.

    Args:
      out: folder to create.
      size: side of the images in pixels.
      overwrite: replace an existing data set.
      new_classes: draw the classes that the quick start does not have, for fine-tuning.
      train_views: training images per pair of class and color. The other splits never change.
    Returns:
      Records per split.
    Raises:
      DataError: `out` exists and `overwrite` is False, or it is not a data set of this function;
        `train_views` is below 1.
    """
    import tensorflow_datasets as tfds

    if train_views < 1:
        raise DataError(f"--views: expected 1 or more; got {train_views}")
    mark = "dataset_info.json", _MODULE_NAME
    made = ("dataset_info.json", "features.json", "*.array_record*", "lengths", "cache")
    if problem := files.problem_of_out(out, overwrite, mark, (*made, "LICENSE", "CREDITS.txt")):
        raise DataError(problem)
    classes = classes_lib.NEW if new_classes else classes_lib.CLASSES
    drawings = {name: drawings_lib.load_class(point, name) for point, name in classes.items()}
    splits = split_items(list(drawings), train_views)

    # The names of the class and of its module, and the description, are written into the data set.
    # They keep their first spelling: reports hold a checksum of all files.
    class OpenmojiColours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = _MODULE_NAME
        VERSION = tfds.core.Version("1.0.0")
        # nothing is downloaded; without this, tfds looks for a file of checksums
        url_infos: ClassVar = {}  # pyright: ignore[reportIncompatibleVariableOverride]

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="OpenMoji drawings in palette colours, with captions.",
                license="CC BY-SA 4.0",
                homepage="https://openmoji.org",
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                        "captions": tfds.features.Sequence(tfds.features.Text()),
                        "class": tfds.features.Text(),
                        "colour": tfds.features.Text(),
                    }
                ),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {name: self._generate_examples(name) for name in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for item in splits[split]:
                yield (
                    item.id,
                    {
                        "id": item.id,
                        "image": io.BytesIO(render_item(drawings[item.name], item, size)),
                        "captions": drawings_lib.captions(item.color, item.name),
                        "class": item.name,
                        "colour": item.color,
                    },
                )

    tfds.disable_progress_bar()
    with files.replacing(out) as new, tempfile.TemporaryDirectory(dir=out.parent) as work:
        builder = OpenmojiColours(data_dir=work, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints the temporary folder
            builder.download_and_prepare()
        folder = Path(str(builder.data_dir))
        (folder / "CREDITS.txt").write_text(CREDITS)
        os.replace(folder, new)
    return {name: len(items) for name, items in splits.items()}
