"""Scores of benchmarks and their bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 5_000_000  # bounds memory: 40 MB


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of a benchmark, with what a bootstrap needs.

    In each stratum (a task, say) the score is sum(values) / sum(weights), 0 where the weights are
    0. The score of a benchmark is the mean over its strata, or their sum.

    Args:
      values, weights: float64[N]. A mean has weights 1. F1 is 2 TP / (2 TP + FP + FN).
      groups: N labels. Rows of one group depend on each other (questions about one image).
      strata: N labels.
      total: strata are added, as MME adds its tasks, instead of averaged.
    """

    values: np.ndarray
    weights: np.ndarray
    groups: tuple[Hashable, ...]
    strata: tuple[Hashable, ...]
    total: bool = False

    @property
    def value(self) -> float:
        members = self._members()
        ratios = _ratio(
            np.asarray([self.values[m].sum() for m in members]),
            np.asarray([self.weights[m].sum() for m in members]),
        )
        return float(np.sum(ratios) if self.total else np.mean(ratios))

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % percentile bootstrap interval; whole groups are resampled inside each stratum."""
        generator = np.random.default_rng(seed)
        ratios = []
        for m in self._members():
            groups = [g for g, member in zip(self.groups, m, strict=True) if member]
            ratios.append(_resampled(self.values[m], self.weights[m], groups, generator))
        return _percentiles(np.sum(ratios, 0) if self.total else np.mean(ratios, 0))

    def _members(self) -> list[np.ndarray]:
        """bool[N] of each stratum."""
        labels = dict.fromkeys(self.strata)
        return [np.asarray([s == label for s in self.strata], bool) for label in labels]


def score(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    total: bool = False,
) -> Score:
    """A `Score`. By default every row has weight 1 and its own group, and there is one stratum."""
    values = np.asarray(values, np.float64)
    return Score(
        values,
        np.ones(len(values)) if weights is None else np.asarray(weights, np.float64),
        tuple(range(len(values)) if groups is None else groups),
        tuple([""] * len(values) if strata is None else strata),
        total,
    )


def by_category(
    values: Sequence[float | bool],
    categories: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Score]:
    """100 x the mean of the values: 'overall', and of each category by its name."""
    percent = 100 * np.asarray(values, np.float64)
    groups = range(len(percent)) if groups is None else groups
    out = {"overall": score(percent, groups=groups)}
    for category in sorted({*(categories or ())}):
        rows = [i for i, own in enumerate(categories or ()) if own == category]
        out[category] = score(percent[rows], groups=[groups[i] for i in rows])
    return out


def _resampled(
    values: np.ndarray,
    weights: np.ndarray,
    groups: Sequence[Hashable],
    generator: np.random.Generator,
) -> np.ndarray:
    """float64[RESAMPLES]: sum(values) / sum(weights) of resampled groups."""
    index = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    member = np.asarray([index[label] for label in groups])
    sums = np.bincount(member, weights=values)
    counts = np.bincount(member, weights=weights)
    chance = np.full(len(index), 1 / len(index))
    step = max(1, _DRAWS_AT_ONCE // len(index))
    ratios = []
    for begin in range(0, RESAMPLES, step):
        drawn = generator.multinomial(len(index), chance, min(step, RESAMPLES - begin))
        ratios.append(_ratio(drawn @ sums, drawn @ counts))
    return np.concatenate(ratios)


def _ratio(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.divide(values, weights, out=np.zeros_like(values), where=weights != 0)


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
