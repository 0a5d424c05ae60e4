"""How far two sets of features lie apart, each taken for a normal distribution."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from janusflow_jax.config.errors import JanusFlowError


def distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Squared Frechet distance of the normal distributions with the sets' means and covariances:
    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (the formula of FID; the features are not).

    It grows as sets shrink: `halves` says by how much.

    Raises:
      JanusFlowError: fewer than two in a set, or features of two widths.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise JanusFlowError(
            f"distance: expected two sets of two or more features of one width; got {a.shape} and "
            f"{b.shape}"
        )
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # (C_a C_b)^(1/2) has the trace of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
    root = _root(cov_a)
    values = np.linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.maximum(values, 0.0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _root(cov: np.ndarray) -> np.ndarray:
    """Square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def halves(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Mean distance of a's even and odd rows from b: what half the sample would have given."""
    return (distance(a[::2], b) + distance(a[1::2], b)) / 2
