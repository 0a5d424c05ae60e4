"""A LoRA run keeps its start once: checkpoints hold what trains, and the run needs no start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import runs
from helpers.runs import tiny_config as config

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import trees


def lora_config(folder, **changes) -> c.TrainConfig:
    cfg = config(folder, train_parts=("gen_head",), start="first", allow_fresh=False, **changes)
    cfg.lora = c.LoraConfig(rank=4, targets=("q", "down"))
    return cfg


def weights(folder, **how) -> dict:
    return trees.flatten(jax.device_get(model_folder.load_model(folder, **how).params))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a
    )


def begin() -> None:
    """A run to start from; with a step of its own, so that its weights are no fresh ones."""
    train.train(config("first", num_steps=1))


@pytest.mark.slow
def test_the_start_is_kept_once(store, monkeypatch):
    frozen = "bfloat16"
    begin()
    runs.share_compiled_step(monkeypatch)
    train.train(lora_config("whole", frozen_dtype=frozen))
    train.train(lora_config("parts", frozen_dtype=frozen, num_steps=1))
    held = runs.last_arrays("whole")
    names = {n.removeprefix("params/") for n in held if n.startswith("params/")}
    assert {n.split("/")[0] for n in names} == {"llm", "gen_head"}
    assert all("lora_" in n for n in names if n.startswith("llm/"))

    # The start may be gone, or have trained on: the run goes on from what it began with.
    shutil.rmtree("first")
    train.train(lora_config("parts", frozen_dtype=frozen))
    again = runs.last_arrays("parts")
    assert held.keys() == again.keys()
    for name, x in held.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
    assert same(weights("whole"), weights("parts"))
    kinds = {n: str(x.dtype) for n, x in weights("whole", merged=False).items()}
    assert kinds["gen_head/kernel"] == "float32" and kinds["llm/embedding"] == frozen

    # `base/` is a model of its own, the one that the adapters stand on.
    base = weights("whole/base")
    apart = weights("whole", merged=False)
    for name, x in base.items():
        assert np.array_equal(apart[name], x) == (not name.startswith("gen_head")), name


@pytest.mark.slow
def test_a_damaged_start_is_named(store):
    begin()
    train.train(lora_config("run", num_steps=1))
    sums = json.loads(Path("run/base/checksums.json").read_text())
    file = Path("run/base", next(n for n in sums if n.startswith("params/llm/")))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="base"):
        model_folder.load_model("run")
    with pytest.raises(CheckpointError, match="base"):
        train.train(lora_config("run", num_steps=2))
