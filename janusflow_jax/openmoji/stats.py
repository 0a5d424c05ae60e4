"""Compares a score with its baseline: paired differences with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import stats

_ROUNDING = 1e-9  # equal scores may differ by this much


def compare(
    scores: np.ndarray, baseline: np.ndarray, groups: Sequence[Hashable] | None = None
) -> dict[str, float | bool]:
    """Compares scores with a baseline on the same items; higher is better.

    Args:
      scores, baseline: float[N], item by item.
      groups: labels of items that depend on each other (views of one drawing) and are resampled
        together; None: every item is its own group.
    Returns:
      score and baseline (means), difference with its 95 % interval low..high, and beats: whether
      the whole interval is above 0.
    """
    scores, baseline = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    low, high = stats.score(scores - baseline, groups=groups).interval()
    return {
        "score": float(scores.mean()),
        "baseline": float(baseline.mean()),
        "difference": float((scores - baseline).mean()),
        "low": low,
        "high": high,
        "beats": low > _ROUNDING,
    }


def against_others(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a table of every item against every target into own scores and the mean of the others.

    The mean over the others is the mean over all ways to shuffle the targets.

    Args:
      table: float[N, N], item i scored against target j.
    Returns:
      float[N], float[N]: the diagonal; the mean of each row without its diagonal.
    Raises:
      JanusFlowError: fewer than two items.
    """
    table = np.asarray(table, np.float64)
    if len(table) < 2:
        raise JanusFlowError(f"expected two or more items to shuffle; got {len(table)}")
    own = np.diagonal(table)
    return own, (table.sum(1) - own) / (len(table) - 1)
