"""Is a score better than its baseline? Paired differences with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from janusflow_jax.config.errors import JanusFlowError

RESAMPLES = 10_000
_ROUNDING = 1e-9  # equal scores differ by this at most, and beat nothing


def bootstrap_interval(
    values: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
      values: float[N].
      groups: N labels; values of one group are not independent (views of one drawing), so whole
        groups are drawn. None: every value on its own.
      level: share of resamples inside.
      seed: the interval is the same for the same values.
    """
    values = np.asarray(values, np.float64)
    labels = list(range(len(values))) if groups is None else list(groups)
    if not len(values) or len(labels) != len(values):
        raise JanusFlowError(
            f"bootstrap: expected values and one group each; got {len(values)} and {len(labels)}"
        )
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    member = np.asarray([index[label] for label in labels])
    sums = np.bincount(member, weights=values)
    counts = np.bincount(member)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), RESAMPLES)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(
    scores: np.ndarray,
    baseline: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, float | bool]:
    """A score against a baseline on the same items; higher is better.

    Args:
      scores, baseline: float[N], item by item.
      groups: as in `bootstrap_interval`.
    Returns:
      score and baseline (means), difference with its 95 % interval low..high, and beats: whether
      the whole interval is above 0.
    """
    scores, baseline = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    low, high = bootstrap_interval(scores - baseline, groups, seed=seed)
    return {
        "score": float(scores.mean()),
        "baseline": float(baseline.mean()),
        "difference": float((scores - baseline).mean()),
        "low": low,
        "high": high,
        "beats": low > _ROUNDING,
    }


def against_others(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Own score and the mean over the others', from a table of every item with every target.

    The mean over all ways to exchange the targets, so no shuffle has to be drawn.

    Args:
      table: float[N, N], item i scored against target j.
    Returns:
      float[N], float[N]: the diagonal; the mean of each row without its diagonal.
    """
    table = np.asarray(table, np.float64)
    own = np.diagonal(table)
    return own, (table.sum(1) - own) / (len(table) - 1)
