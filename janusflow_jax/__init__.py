"""JanusFlow in JAX: one model that reads pictures and paints them."""

from __future__ import annotations

import sys
from typing import Any

from janusflow_jax.config import stages

# Config files written before the packages import `janusflow_jax.config_stages`. Remove in 0.3.
sys.modules[f"{__name__}.config_stages"] = stages


def load(
    path: Any,
    dtype: str | None = None,
    mesh: Any = None,
    weights: str = "ema",
    int8: bool = False,
    adapter: Any = "",
) -> Any:
    """Loads a model to paint, chat and encode with: `janusflow_jax.pipeline.load`.

    Args:
      path: a model folder, a training run's folder or one of its checkpoints.
      dtype: 'float32' or 'bfloat16'; None: float32 on CPU, bfloat16 on TPU and GPU.
      mesh: a `jax.sharding.Mesh` to spread the parameters over; None: one device.
      weights: 'ema', or 'params' (raw) of a training run.
      int8: the language model in a byte a weight (extra `int8`).
      adapter: a folder of `tools/export_checkpoint.py --adapter-only`, added to the language model.
    """
    from janusflow_jax import pipeline  # here, so that config files do not import JAX

    return pipeline.load(path, dtype=dtype, mesh=mesh, weights=weights, int8=int8, adapter=adapter)
