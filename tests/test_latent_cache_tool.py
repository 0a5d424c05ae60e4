"""tools/cache_latents.py on a data set on disk: its messages, its processes, what it leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from helpers import golden, runs
from helpers.published import to_model

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import workdir
from janusflow_jax.config.errors import CheckpointError, DataError
from janusflow_jax.data import cache as latent_cache

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "cache_latents.py"


def prepared(folder: Path) -> str:
    """A small data set as tfds prepares it."""
    import tensorflow_datasets as tfds

    class Foxes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(30):
                record = runs.record(i)
                yield i, {**record, "image": io.BytesIO(record["image"])}

    builder = Foxes(data_dir=str(folder / "prepared"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def cache(data: str, model: str, out: str, *args: str) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    main(["--data", data, "--model", model, "--out", out, "--shard-records", "8", *args])


@pytest.mark.slow
def test_processes_share_the_work_and_errors_are_one_line(tmp_path):
    data, model = prepared(tmp_path), str(tmp_path / "model")
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", model)
    cache(data, model, str(tmp_path / "whole"), "--crops", "2", "--features")
    command = [
        sys.executable,
        str(TOOL),
        "--data",
        data,
        "--out",
        str(tmp_path / "parts"),
        "--shard-records",
        "8",
        "--crops",
        "2",
        "--features",
    ]

    def run(*args: str) -> subprocess.CompletedProcess:
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run([*command, *args], capture_output=True, text=True, env=env)

    shared = ("--model", model, "--num-processes", "2", "--process")
    for process in ("0", "1"):
        out = run(*shared, process)
        assert out.returncode == 0, out.stderr
        assert "2 shards written, 0 existed" in out.stdout
    names = sorted(p.name for p in (tmp_path / "parts").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "whole").iterdir()) and len(names) == 9
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    bad = run("--model", str(ROOT / "starts" / "emoji_vae"))
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.count("\n") <= 1 and "none of" in bad.stderr and "has siglip" in bad.stderr
    assert "Traceback" not in run("--model", str(tmp_path / "nowhere")).stderr


@pytest.mark.slow
def test_training_with_caches_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """By the commands that people use, on a prepared data set: two steps and one more are three."""
    data = prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", "start")
    cache(data, "start", "gen", "--crops", "2", "--features", "--dtype", "float32")
    cache(data, "start", "und", "--task", "understand", "--dtype", "float32")
    folders = {"generate": "gen", "understand": "und"}

    def run(workdir: str, num_steps: int) -> None:
        cfg = runs.config(workdir, num_steps=num_steps)
        cfg.start, cfg.allow_fresh = "start", False
        sources = tuple(
            dataclasses.replace(s, path=data, cache=folders[s.task]) for s in cfg.data.sources
        )
        cfg.data = dataclasses.replace(cfg.data, sources=sources)
        train.train(cfg)

    run("whole", 3)
    run("parts", 2)
    run("parts", 3)
    a, b = runs.last_arrays("whole"), runs.last_arrays("parts")
    assert a.keys() == b.keys() and len(a) > 100
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    last = runs.read_metrics("parts")[-1]
    assert last["ok"] == 1 and last["bad_samples"] == 0 and last["loss_rf"] > 0
    manifest = tmp_path / "und" / latent_cache.FILE
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "siglip": "another's"}))
    with pytest.raises(DataError, match="und: .* this run's SigLIP .* another's"):
        run("parts", 4)  # what it began with is known, whatever lies there now
    folders["generate"] = ""
    with pytest.raises(CheckpointError, match="data.sources"):
        run("parts", 4)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its config.json has sources without the fields that came later."""
    cfg = runs.config(tmp_path)
    given = c.to_dict(cfg)
    del given["data"]["cached_features"]
    for source in given["data"]["sources"]:
        del source["cache"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert workdir.check(epath.Path(tmp_path), cfg).data.packing == cfg.data.packing
    del given["data"]["packing"]  # its rows were made in another way, and stay so
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert workdir.check(epath.Path(tmp_path), cfg).data.packing == 1
    cfg.data.sources[0].cache = "elsewhere"
    with pytest.raises(CheckpointError, match="data.sources"):
        workdir.check(epath.Path(tmp_path), cfg)
