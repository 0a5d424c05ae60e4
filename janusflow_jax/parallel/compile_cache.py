"""The cache of compiled programs on disk, which later processes read instead of compiling again."""

from __future__ import annotations

import importlib.util
import os

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

VARIABLE = "JANUSFLOW_COMPILATION_CACHE"
MAX_BYTES = 4 << 30
MIN_SECONDS = 0.5
"""Programs that compile faster are not cached."""


def enable() -> str | None:
    """Caches compiled programs in `~/.cache/janusflow_jax` (`$XDG_CACHE_HOME` applies).

    `JANUSFLOW_COMPILATION_CACHE` names another folder, which may be in a bucket, or `off`. A folder
    that JAX has already (`JAX_COMPILATION_CACHE_DIR`) stays. The folder may be deleted at any time.

    Returns:
      the folder; None if the cache is off or cannot be written.
    """
    if folder := getattr(jax.config, "jax_compilation_cache_dir", None):
        return str(folder)
    setting = os.environ.get(VARIABLE, "")
    if setting.lower() in ("off", "0", "no", "none"):
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    is_local = "://" not in setting
    try:
        folder = epath.Path(setting or f"{base}/janusflow_jax").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ImportError):  # no home, no library for this bucket
        return None
    if is_local and not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # JAX needs filelock to delete the least used programs, and deletes none in a bucket.
    if is_local and importlib.util.find_spec("filelock"):
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    compilation_cache.reset_cache()  # a compilation before this call has switched it off
    return str(folder)
