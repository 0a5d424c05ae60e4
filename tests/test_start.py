"""How a run starts: what it compiles, and what its devices hold until the first step."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from helpers import jobs, runs

from janusflow_jax import config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.data import loader
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.training import init as initialization
from janusflow_jax.training.run import Run, open_run
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
def train_and_count(*args):
    train_run(*args)
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


SAMPLED = (
    "training/init.py",
    "training/run.py",
    "checkpoints/model_folder.py",
    "checkpoints/run.py",
)


def bytes_of_devices(arrays: Any) -> Counter:
    """Bytes on every device; arrays may share buffers."""
    buffers = {}
    for x in arrays:
        for data in () if x.is_deleted() else (s.data for s in x.addressable_shards):
            buffers[data.device, data.unsafe_buffer_pointer()] = data.nbytes
    out = Counter()
    for (device, _), size in buffers.items():
        out[device] += size
    return out


def with_peak(function: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the most bytes that a device held when a function of `SAMPLED` returned."""
    before, peak = bytes_of_devices(jax.live_arrays()), Counter()

    def sample(frame: Any, event: str, _: Any) -> None:
        nonlocal peak
        if event == "return" and frame.f_code.co_filename.endswith(SAMPLED):
            now = bytes_of_devices(jax.live_arrays())
            now.subtract(before)
            peak |= now

    sys.setprofile(sample)
    try:
        return function(), max(peak.values())
    finally:
        sys.setprofile(None)


WIDE = {"width": 128, "mlp_width": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16}
CASES = {
    "trained": {},
    "frozen": {"train_parts": ("gen_head",), "frozen_dtype": "bfloat16"},
    "LoRA": {
        "train_parts": (),
        "frozen_dtype": "bfloat16",
        "lora": c.LoraConfig(rank=2, targets=("q",)),
    },
}


def wide_config(start: str = "", **fields: Any) -> c.TrainConfig:
    """A run whose LLM is most of it and divides over 8 devices."""
    cfg = runs.tiny_config("run", **fields)
    cfg.model.llm = dataclasses.replace(cfg.model.llm, **WIDE)
    cfg.mesh, cfg.allow_fresh = c.MeshConfig(fsdp=8), not start
    cfg.init = tuple((part, start) for part in ("llm", "und_encoder", "vae") if start)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_device_holds_more_than_its_share(store, monkeypatch, case):
    """When a run begins from a model with some fresh parts, when all parts are fresh, and when it
    resumes, which reads nothing that the checkpoint holds."""
    make_mesh, load_tree, reads = sharding.make_mesh, model_folder.load_tree, []

    def load(path: Any, like: Any = None) -> Any:
        reads.append(path.name)
        return load_tree(path, like)

    monkeypatch.setattr(sharding, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()))
    monkeypatch.setattr(model_folder, "load_tree", load)
    start = runs.save_start("start", model=wide_config().model)
    wanted = model_folder.load_model("start").params
    assert wanted is not None
    reads.clear()

    def check(run: Run, peak: int) -> None:
        share = max(bytes_of_devices(jax.tree.leaves(run.state)).values())
        assert peak < 1.2 * share
        assert 4 * share < sum(x.nbytes for x in jax.tree.leaves(run.state))
        llm = run.state["params" if case == "trained" else "frozen"]["llm"]
        kernel = llm["layers"]["block"]["mlp"]["up"]["kernel"]
        assert len(kernel.sharding.device_set) == 8 and not kernel.is_fully_replicated

    run, peak = with_peak(lambda: open_run(wide_config(start, **CASES[case])))
    check(run, peak)
    whole = trees.merge(run.state["params"], run.state["frozen"])
    for name, x in trees.flatten({"llm": wanted["llm"]}).items():
        got = trees.flatten(whole)[name]
        np.testing.assert_array_equal(got, x.astype(got.dtype), err_msg=name)
    assert {*reads} >= {"llm", "und_encoder", "vae"}
    run.save(1, loader.Report(8, 8, [], 0, 0))
    run.checkpoints.wait()
    saved = {n: np.array(x) for n, x in trees.flatten(whole).items()}
    del run, whole

    reads.clear()
    monkeypatch.setattr(initialization, "fresh_params", None)
    run, peak = with_peak(lambda: open_run(wide_config(start, **CASES[case])))
    check(run, peak)
    assert run.first_step == 1 and ("llm" in reads) == (case == "LoRA")
    if case != "LoRA":
        assert reads == ["vae"]
    for name, x in trees.flatten(trees.merge(run.state["params"], run.state["frozen"])).items():
        np.testing.assert_array_equal(x, saved[name], err_msg=name)
