"""Every test runs on 8 fake CPU devices, in full float32 precision, and downloads nothing."""

import os
import tempfile

# The environment is for processes that tests start; JAX may be imported already (jaxtyping's
# pytest plugin comes first), so this one is told by its config.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("XLA_FLAGS", None)

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Tests compile the same steps again and again; within one session each is compiled once.
_cache = tempfile.TemporaryDirectory(prefix="jax-cache-")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
