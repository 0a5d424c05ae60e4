"""Plots of docs/small_scale.md and docs/finetuning.md from their stored numbers (extra plots)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    import matplotlib  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit("plots need matplotlib: pip install -e '.[plots]'")

matplotlib.use("Agg")

from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

from experiments import small_scale_tables as tables

COLORS = {letter: f"C{i}" for i, letter in enumerate(tables.LETTERS)}
DPI = 80
DOTS = (
    "percentile",
    "hue",
    "heldout_pairs_exact",
    "alignment",
    "frechet",
    "heldout_pairs_words",
)
COLUMNS = 3
SWEPT = {"percentile": "o-", "hue": "s--", "alignment": "^:"}
LOSSES = {"loss_rf": "flow loss (RF)", "loss_ar": "caption loss (AR)"}


def draw(numbers: dict[str, Any], folder: Path) -> list[Path]:
    """Writes all plots as PNG; returns the files."""
    plots = {"letters": letters(numbers), "curves": curves(numbers), "sweeps": sweeps(numbers)}
    files = []
    for name, figure in plots.items():
        files.append(folder / f"small_scale_{name}.png")
        save(figure, files[-1])
    return files


def save(figure: Figure, file: Path) -> None:
    """Writes a plot as PNG without time or version, so the same numbers give the same file."""
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)


def letters(numbers: dict[str, Any]) -> Figure:
    """A dot for every run, a line for the mean of a letter, a panel for every score."""
    figure, axes = _panels(len(DOTS))
    for axis, key in zip(axes, DOTS, strict=True):
        score = tables.BY_KEY[key]
        for x, letter in enumerate(tables.LETTERS):
            values = tables.of_letter(numbers, letter, key)
            if values:
                mean = tables.mean(values)
                axis.hlines(mean, x - 0.25, x + 0.25, color=COLORS[letter], linewidth=2)
                axis.plot([x] * len(values), values, "o", color=COLORS[letter], markersize=5)
        axis.set_xticks(range(len(tables.LETTERS)), list(tables.LETTERS))
        axis.set_xlim(-0.6, len(tables.LETTERS) - 0.4)
        axis.set_title(score.words, fontsize=9)
    return figure


def curves(numbers: dict[str, Any]) -> Figure:
    """Losses by share of the run, a line for every run."""
    figure, axes = _panels(len(LOSSES))
    for axis, (loss, title) in zip(axes, LOSSES.items(), strict=True):
        labeled = set()
        for name, curve in numbers["curves"].items():
            if loss not in curve:
                continue
            share = [x / curve["step"][-1] for x in curve["step"]]
            label = None if name[0] in labeled else name[0]
            labeled.add(name[0])
            color = COLORS[name[0]]
            axis.plot(share, curve[loss], color=color, linewidth=0.8, label=label)
        axis.set_title(f"{title}, running mean", fontsize=9)
        axis.set_xlabel("share of the run")
        axis.legend(fontsize=8)
    return figure


def sweeps(numbers: dict[str, Any]) -> Figure:
    """Generation scores of F by guidance and by steps."""
    figure, axes = _panels(2)
    for axis, (sweep, title) in zip(
        axes, {"guidance": "guidance scale w", "steps": "Euler steps"}.items(), strict=True
    ):
        points = numbers["sweeps"][sweep]
        places = sorted({x["value"] for x in points})
        swept = [k for k in SWEPT if any(k in x["scores"] for x in points)]
        for key in swept:
            per_place = [
                [x["scores"][key]["score"] for x in points if x["value"] == place]
                for place in places
            ]
            means = [tables.mean(x) for x in per_place]
            axis.plot(places, means, SWEPT[key], label=tables.BY_KEY[key].words, markersize=4)
            low, high = [min(x) for x in per_place], [max(x) for x in per_place]
            axis.fill_between(places, low, high, alpha=0.15)
        axis.set_xlabel(title)
        axis.set_ylim(0.4, 1.3)  # shares and cosines; the legend above them
        if points:
            axis.legend(fontsize=7, loc="upper center")
    return figure


def forgetting(numbers: dict[str, Any], kinds: dict[str, str], losses: dict[str, str]) -> Figure:
    """Held-out losses of fine-tuning by step, a line for every run (experiments/forgetting.py)."""
    figure, axes = _panels(len(losses))
    for axis, (loss, title) in zip(axes, losses.items(), strict=True):
        for color, (kind, words) in enumerate(kinds.items()):
            runs = [x["curve"] for name, x in numbers["runs"].items() if name.startswith(kind)]
            for i, curve in enumerate(runs):
                label = None if i else words
                axis.plot(curve["step"], curve[loss], color=f"C{color}", label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels in rows of COLUMNS."""
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    size = (3.4 * columns + 0.5, 2.9 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="tight", squeeze=False)
    axes = list(grid.ravel())
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    return figure, axes[:count]
