"""The cache of compiled programs on disk, which later processes read instead of compiling again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from janusflow_jax import memory
from janusflow_jax.config import files

VARIABLE = "JANUSFLOW_COMPILATION_CACHE"
MAX_BYTES = 4 << 30
MIN_FREE_BYTES = 16 << 20
MIN_SECONDS = 0.5
"""Programs that compile faster are not cached."""


def enable() -> str | None:
    """Caches compiled programs in `~/.cache/janusflow_jax` (`$XDG_CACHE_HOME` applies).

    `JANUSFLOW_COMPILATION_CACHE` names another folder, which may be in a bucket, or `off`. A folder
    that JAX has already (`JAX_COMPILATION_CACHE_DIR`) stays. The folder may be deleted at any time.

    Returns:
      the folder; None if the cache is off, or cannot be written (warns).
    """
    if folder := getattr(jax.config, "jax_compilation_cache_dir", None):
        return str(folder)
    setting = os.environ.get(VARIABLE, "")
    if setting.lower() in ("off", "0", "no", "none"):
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder, is_local = setting or f"{base}/janusflow_jax", not files.is_remote(setting)
    try:
        if is_local:
            folder = os.path.expanduser(folder)
            if folder.startswith("~"):
                raise OSError(f"{folder}: this user has no home")
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
                raise OSError(f"{folder}: its disk is full")
        else:
            files.resolve(folder).mkdir(parents=True, exist_ok=True)
    except Exception as error:  # noqa: BLE001 - each store has errors of its own
        warnings.warn(
            f"compiled programs are not kept ({error}); {VARIABLE}=FOLDER names a folder for them, "
            "off ends this warning",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # JAX needs filelock to delete the least used programs, and deletes none in a bucket.
    if is_local and importlib.util.find_spec("filelock"):
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    compilation_cache.reset_cache()  # a compilation before this call has switched it off
    return folder


def _discard_gaps(event: str, duration_secs: float, **_: Any) -> None:
    """After each compilation, with or without the cache."""
    if event == "/jax/core/compile/backend_compile_duration" and duration_secs > MIN_SECONDS:
        memory.discard_gaps()


jax.monitoring.register_event_duration_secs_listener(_discard_gaps)
