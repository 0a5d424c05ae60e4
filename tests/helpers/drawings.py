"""A small world of colored polygons for the scores and the judge: drawings, a model that is always
right, and a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from janusflow_jax import config as c, pipeline
from janusflow_jax.openmoji import drawings as openmoji_drawings, judge, scores

SHAPES = {
    f"{word} shape {sides}": (sides, thin)
    for sides in (3, 4, 5, 6)
    for word, thin in (("round", 1.0), ("flat", 0.6), ("thin", 0.35))
}
COLORS = ("red", "blue", "green")


def draw(name: str, color: str, turn=0.0, scale=1.0, shift=(0, 0)) -> np.ndarray:
    """A polygon with a black outline on white, in a palette color: uint8[64, 64, 3]."""
    sides, thin = SHAPES[name]
    angle = np.arange(sides) / sides * 2 * np.pi + np.deg2rad(turn)
    x = 32 + shift[0] + 24 * scale * np.cos(angle)
    y = 32 + shift[1] + 24 * scale * thin * np.sin(angle)
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    points = [(4 * a, 4 * b) for a, b in zip(x, y, strict=True)]
    pen.polygon(points, fill=openmoji_drawings.tone_hex(color, 0), outline="black", width=8)
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX))


def draw_all(**view) -> tuple[list[np.ndarray], list[scores.Label]]:
    """Every shape in every color, and the labels."""
    labels = [scores.Label(name, color) for name in SHAPES for color in COLORS]
    return [draw(x.name, x.color, **view) for x in labels], labels


def real_drawings(labels: list[scores.Label]) -> tuple[dict, dict]:
    """Two views of every label, and an unseen one."""
    views = {x: [draw(x.name, x.color, turn=t) for t in (0, 3)] for x in labels}
    return views, {x: draw(x.name, x.color, turn=6) for x in labels}


class PerfectModel(pipeline.Pipeline):
    """Generates the right drawing of every prompt."""

    def __init__(self):
        self.params, self.vae = dict.fromkeys(c.MODEL_PARTS), {"decoder": None}
        self.source = "it"
        self.cfg = c.model_config("emoji")

    def generate(self, prompts, *, output, **_):  # pyright: ignore
        assert output == "numpy"
        labels = [scores.parse_caption(p) for p in prompts]
        return np.stack([draw(x.name, x.color, turn=4) for x in labels])


def save_judge(folder: Path) -> tuple[judge.JudgeConfig, dict[str, Any]]:
    """Writes a fresh judge of the polygons; returns its config and parameters."""
    tower = c.SiglipConfig(
        image_size=64, patch_size=16, width=24, num_layers=1, num_heads=2, mlp_width=48
    )
    cfg = judge.JudgeConfig(image=tower, classes=tuple(sorted(SHAPES)), colors=COLORS, width=8)
    params = judge.init_params(cfg, jax.random.key(0))
    judge.save(folder, cfg, params, {"accuracy": {}})
    return cfg, params
