"""How a run starts: what it compiles, and what its devices hold until the first step."""

from __future__ import annotations

import pytest
from helpers import jobs

from tools import crash_test

COUNT_MISSES = """
import jax, os
from janusflow_jax.parallel import compile_cache
jax.config.update("jax_compilation_cache_dir", None)
os.environ["JANUSFLOW_COMPILATION_CACHE"] = {cache!r}
compile_cache.MIN_SECONDS = 0.0
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
train_run = train.train
def train_and_count(cfg):
    train_run(cfg)
    print("misses", events.count("cache_misses"), "hits", events.count("cache_hits"))
train.train = train_and_count
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "squares"
    crash_test.make_data(folder)
    return folder


@pytest.mark.slow
def test_a_second_start_compiles_nothing(data, tmp_path):
    patch = COUNT_MISSES.format(cache=str(tmp_path / "cache"))
    counts = []
    for workdir in ("one", "two"):
        output = jobs.run(data, tmp_path / workdir, "num_steps=1", patch=patch)
        words = output.split()
        counts.append([int(words[words.index(n) + 1]) for n in ("misses", "hits")])
    (misses, _), (misses_again, hits_again) = counts
    assert misses > 0 and misses_again == 0 and hits_again >= misses
