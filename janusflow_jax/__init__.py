"""JanusFlow in JAX: one model that reads pictures and paints them."""

from __future__ import annotations

from typing import Any


def load(path: str, **options: Any) -> Any:
    """Loads a model to paint, chat and encode with: `janusflow_jax.pipeline.load`."""
    from janusflow_jax import pipeline  # here, so that config files do not import JAX

    return pipeline.load(path, **options)
