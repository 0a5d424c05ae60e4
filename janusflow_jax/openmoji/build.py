"""Builds the OpenMoji data set: which picture goes to which split, and the ArrayRecord files.

Splits: `train` (3 views of every trained pair), `heldout_views` (1 other view of every trained
pair), `heldout_pairs` (2 views of every (class, colour) pair that training never sees).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format, samples
from janusflow_jax.openmoji import (
    classes as openmoji_classes,
    drawings as openmoji_drawings,
    prompts as openmoji_prompts,
)

TRAIN_VIEWS = 3
HELDOUT_VIEWS = 1
HELDOUT_PAIR_VIEWS = 2
HELDOUT_PER_COLOUR = 24  # of the classes, so that no colour is missed more than another
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

START_NOTICE = """\
# {title}

Weights that the quick start (`configs/emoji.py`) begins from, made by

    {command}

They were learned from drawings of [OpenMoji](https://openmoji.org) 17 - the open-source emoji and
icon project - recoloured and rendered by `tools/prepare_openmoji.py`, and are under the drawings'
licence, [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).
"""

JUDGE_NOTICE = """\
# The judge of the quick start's pictures

Two towers that score what the quick start paints (`janusflow_jax/eval/judge.py`; no training
begins from them), made by

    {command}

They were learned from drawings of [OpenMoji](https://openmoji.org) 17 - the open-source emoji and
icon project - recoloured and rendered by `tools/prepare_openmoji.py`, and are under the drawings'
licence, [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One record before rendering."""

    name: str
    colour: str
    view: int

    @property
    def id(self) -> str:
        return f"{self.name.replace(' ', '_')}-{self.colour}-{self.view}"


def load_drawings(
    classes: Mapping[str, str] | None = None,
) -> dict[str, openmoji_drawings.Drawing]:
    """Every class by name, checked.

    Args: classes: code point -> name; None: the quick start's.

    Raises:
      JanusFlowError: a drawing whose color cannot be changed, or a missing class of the sheet
        (lists all of them).
    """
    classes = openmoji_classes.CLASSES if classes is None else classes
    drawings, problems = {}, []
    for point, name in classes.items():
        drawing = openmoji_drawings.load_class(point, name)
        if drawing is None or not openmoji_drawings.recolours_well(drawing):
            problems.append(f"{point} {name}: expected one dominant colour that can be changed")
        else:
            drawings[name] = drawing
    missing = {name for _, name, _ in openmoji_prompts.SHEET} - set(classes.values())
    if classes is openmoji_classes.NEW:  # the sheet is of the others
        missing = set()
    problems += [f"{name}: named by the sheet but not a class" for name in sorted(missing)]
    if problems:
        raise JanusFlowError(
            "OpenMoji classes (edit janusflow_jax/data/openmoji_classes.py):\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return drawings


def heldout_pairs(names: list[str], seed: int) -> set[tuple[str, str]]:
    """The (class, colour) pairs that training never sees, the same number for every colour.

    Classes of the sheet hold out only what the sheet holds out; every other class at most one
    colour, so every class keeps at least 7 training colours.
    """
    pairs = {(name, colour) for colour, name, trained in openmoji_prompts.SHEET if not trained}
    on_sheet = {name for _, name, _ in openmoji_prompts.SHEET}
    free = [name for name in sorted(names) if name not in on_sheet]
    order = np.random.default_rng(seed).permutation(len(free))
    colours = list(openmoji_prompts.PALETTE)
    per_colour = min(HELDOUT_PER_COLOUR - 1, len(free) // len(colours))
    for i in range(per_colour * len(colours)):
        pairs.add((free[order[i]], colours[i % len(colours)]))
    return pairs


def plan(names: list[str], seed: int) -> dict[str, list[Picture]]:
    """Every picture of every split, in a fixed order."""
    held = heldout_pairs(names, seed)
    splits: dict[str, list[Picture]] = {"train": [], "heldout_pairs": [], "heldout_views": []}
    for name in names:
        for colour in openmoji_prompts.PALETTE:
            if (name, colour) in held:
                splits["heldout_pairs"] += [
                    Picture(name, colour, v) for v in range(HELDOUT_PAIR_VIEWS)
                ]
                continue
            splits["train"] += [Picture(name, colour, v) for v in range(TRAIN_VIEWS)]
            splits["heldout_views"] += [
                Picture(name, colour, TRAIN_VIEWS + v) for v in range(HELDOUT_VIEWS)
            ]
    return splits


def view_of(picture: Picture, seed: int) -> openmoji_drawings.View:
    """A small turn, scale and shift that belongs to the picture's id and the seed."""
    key = int.from_bytes(picture.id.encode(), "big")
    rng = np.random.default_rng([seed, key % 2**63, key >> 63])
    return openmoji_drawings.View(
        angle=float(rng.uniform(-10, 10)),
        scale=float(rng.uniform(0.8, 1.0)),
        shift_x=float(rng.uniform(-3, 3)),
        shift_y=float(rng.uniform(-3, 3)),
    )


def picture_png(
    drawing: openmoji_drawings.Drawing, picture: Picture, size: int, seed: int
) -> bytes:
    """The rendered picture, PNG."""
    return openmoji_drawings.render(
        drawing.recoloured(picture.colour), view_of(picture, seed), size
    )


def build(
    out: Path, size: int, seed: int, overwrite: bool, new_classes: bool = False
) -> dict[str, int]:
    """Renders everything and writes the data set, whole or not at all.

    Args:
      out: the folder to make.
      size: side of the pictures in pixels.
      seed: of the views and of the held-out pairs.
      overwrite: replace a folder that exists.
      new_classes: draw the classes that the quick start does not have, for fine-tuning.
    Returns:
      Records per split.
    Raises:
      FileExistsError: `out` exists and `overwrite` is False.
    """
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"{out}: expected a folder that does not exist; it does: pass --overwrite to replace "
            "it, or another --out"
        )
    drawings = load_drawings(openmoji_classes.NEW if new_classes else openmoji_classes.CLASSES)
    splits = plan(list(drawings), seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        data_dir = _write_records(work, splits, drawings, size, seed)
        (data_dir / "CREDITS.txt").write_text(CREDITS)
        _replace(data_dir, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {name: len(pictures) for name, pictures in splits.items()}


def _write_records(
    work: Path,
    splits: dict[str, list[Picture]],
    drawings: dict[str, openmoji_drawings.Drawing],
    size: int,
    seed: int,
) -> Path:
    import tensorflow_datasets as tfds

    class OpenmojiColours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """OpenMoji drawings in palette colours."""

        VERSION = tfds.core.Version("1.0.0")
        # nothing is downloaded; tfds would look for a file of checksums
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
            for picture in splits[split]:
                png = _rgb_png(picture_png(drawings[picture.name], picture, size, seed))
                yield (
                    picture.id,
                    {
                        "id": picture.id,
                        "image": io.BytesIO(png),
                        "captions": openmoji_drawings.captions(picture.colour, picture.name),
                        "class": picture.name,
                        "colour": picture.colour,
                    },
                )

    tfds.disable_progress_bar()
    builder = OpenmojiColours(data_dir=str(work), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints the temporary folder
        builder.download_and_prepare()
    return Path(str(builder.data_dir))


def _rgb_png(png: bytes) -> bytes:
    """The same picture without alpha, as the feature's three channels ask."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "PNG", compress_level=6)
    return out.getvalue()


def _replace(new: Path, out: Path) -> None:
    """Puts `new` in the place of `out`; what was there goes only when the new one stands."""
    if not out.exists():
        os.replace(new, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    os.replace(out, old / "data")
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def tokenizer_texts() -> Iterator[str]:
    """What the quick start's tokenizer is trained on: the fixed words of the forms, all captions.

    The system prompt is repeated so that its words become single tokens (36 in all).
    """
    for _ in range(200):
        yield f"{chat_format.SYSTEM_PROMPT}\n\nUser: \n{samples.QUESTION}\n\nAssistant:"
        yield chat_format.CAPTION_REQUEST
    for name in openmoji_classes.CLASSES.values():
        for colour in openmoji_prompts.PALETTE:
            for text in openmoji_drawings.captions(colour, name):
                yield f"User: {text}\n\nAssistant: {text}"


def contact_sheet(
    seed: int, size: int, columns: int = 16, new_classes: bool = False
) -> Image.Image:
    """Every class once, colours in turn, with its name: to look at."""
    drawings = load_drawings(openmoji_classes.NEW if new_classes else openmoji_classes.CLASSES)
    colours = list(openmoji_prompts.PALETTE)
    cell_w, cell_h = size + 12, size + 14
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, drawing) in enumerate(drawings.items()):
        picture = Picture(name, colours[i % len(colours)], i % TRAIN_VIEWS)
        png = picture_png(drawing, picture, size, seed)
        x, y = i % columns * cell_w, i // columns * cell_h
        sheet.paste(Image.open(io.BytesIO(png)).convert("RGB"), (x + 6, y))
        pen.text((x + 2, y + size), f"{name}"[:13], fill="black")
    return sheet
