"""JanusFlow in JAX: unified image understanding and generation.

    import janusflow_jax as jf
    model = jf.load("runs/emoji")  # a pipeline.Pipeline: generate, chat, encode_image
    cfg = jf.config.model_config("1p3b")
    jf.hub.export("models/janusflow", "exported")

Importing the package imports no JAX, because config files import it too.
"""

from __future__ import annotations

import sys
from typing import Any

from janusflow_jax import config as config, hub as hub, memory
from janusflow_jax.config import stages

if sys.argv[0] == "-m":  # Python is about to run a command of this package, and has one thread
    memory.keep_freed()

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
    """Loads a model to generate images, chat and encode images: see `pipeline.load`."""
    from janusflow_jax import pipeline

    return pipeline.load(path, dtype=dtype, mesh=mesh, weights=weights, int8=int8, adapter=adapter)
