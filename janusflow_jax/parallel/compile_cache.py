"""Compiled programs on disk, so that the next process does not compile them again.

They lie in `~/.cache/janusflow_jax` (`$XDG_CACHE_HOME` is heeded), at most 4 GiB, the least used
go first. `JANUSFLOW_COMPILATION_CACHE` names another folder, or `off` for none; where JAX's own
`JAX_COMPILATION_CACHE_DIR` is set, that stays in force. Delete the folder at any time.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

ENV = "JANUSFLOW_COMPILATION_CACHE"
MAX_BYTES = 4 << 30
MIN_SECONDS = 0.5
"""Programs that compile faster are not kept."""


def enable() -> str | None:
    """Turns the cache on. Returns its folder, or None where it is off or cannot be written."""
    if given := getattr(jax.config, "jax_compilation_cache_dir", None):
        return str(given)
    wanted = os.environ.get(ENV, "")
    if wanted.lower() in ("off", "0", "no", "none"):
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(wanted or f"{base}/janusflow_jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if importlib.util.find_spec("filelock"):  # JAX needs it to remove old programs
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    compilation_cache.reset_cache()  # what was compiled before has fixed it as off
    return str(folder)
