"""What users have on disk keeps working: files made by the code of commit 0f65f22.

The files are in `data/compat`, with the numbers that the code of that commit computed from them
(`expected.json`). These tests use only what users use: command lines, `janusflow_jax.load`, `train`
and config files. They must pass unchanged whatever moves inside the package.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import logging
from safetensors.numpy import load_file

import janusflow_jax
from janusflow_jax import config as c
from janusflow_jax.train import train

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("tests/data/compat")  # relative to ROOT, as in the configs that are stored there
HUB = "tests/data/golden/tiny/janusflow"
EXPECTED = json.loads((ROOT / FOLDER / "expected.json").read_text())
GENERATE = {"prompts": "a red disc", "seed": 0, "num_steps": 3, "output": "latent"}
QUESTION = "What is in the image?"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMAGE = str(ROOT / FOLDER / "images" / "00.png")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def tool(monkeypatch):
    """Runs a script of tools/ as its command line does; returns its exit status."""
    before, verbosity = [signal.getsignal(n) for n in SIGNALS], logging.get_verbosity()

    def run(name: str, *args: object) -> Any:
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, args)])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    yield run
    signal.set_wakeup_fd(-1)
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    logging.set_verbosity(verbosity)


def config(arg: str) -> Any:
    return runpy.run_path(str(FOLDER / "user_config.py"))["get_config"](arg)


def same_losses(workdir: Path, expected: dict[str, dict[str, float]]) -> None:
    """Compares all expected values, step by step, with a run's metrics.jsonl."""
    got: dict[str, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        got.setdefault(str(values["step"]), {}).update(values)
    for step, values in expected.items():
        for name, value in values.items():
            np.testing.assert_allclose(
                got[step][name], value, rtol=1e-5, atol=1e-6, err_msg=f"step {step}: {name}"
            )


def same_latents(latents: np.ndarray, expected: dict[str, Any]) -> None:
    assert list(latents.shape) == expected["shape"]
    got = [latents.mean(), latents.std(), *latents.ravel()[::29][:8]]
    want = [expected["mean"], expected["std"], *expected["values"]]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


def has(values: Any, expected: Any, where: str = "config") -> None:
    """Every expected field is there with its value; fields that came later may stand beside."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert name in values, f"{where}.{name} is gone"
            has(values[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(values) == len(expected), where
        for i, (value, want) in enumerate(zip(values, expected, strict=True)):
            has(value, want, f"{where}[{i}]")
    else:
        assert values == expected, where


@pytest.mark.parametrize("arg", ["lora", "cached", "256"])
def test_user_config_builds_the_same_config(arg):
    values = json.loads(json.dumps(dataclasses.asdict(config(arg))))
    stored = c.from_dict(c.TrainConfig, EXPECTED["config"][arg])  # as a run of then is read
    has(values, c.to_dict(stored))


@pytest.mark.slow
def test_the_training_command_resumes_a_run(tmp_path):
    shutil.copytree(FOLDER / "run", tmp_path / "run")
    command = [sys.executable, "-m", "janusflow_jax.train"]
    args = [
        f"--config={FOLDER}/user_config.py:lora",
        f"--config.workdir={tmp_path / 'run'}",
        "--config.num_steps=4",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from step 2" in done.stdout
    expected = EXPECTED["losses"]["run"]
    assert list(expected) == ["0", "1", "2", "3", "4"]
    held = [n for n in expected["4"] if n.startswith("eval/")]
    assert len(held) == 2
    same_losses(tmp_path / "run", expected)


@pytest.mark.slow
def test_a_run_reads_its_caches(tmp_path):
    cfg = config("cached")
    cfg.data.packing = 1  # the rows that the numbers are of
    cfg.workdir = str(tmp_path / "run")
    train(cfg)
    same_losses(tmp_path / "run", EXPECTED["losses"]["cached"])


@pytest.mark.slow
def test_the_cache_tool_keeps_what_it_made(tmp_path, tool, capsys):
    for task, options in (("generate", ("--crops", 2, "--features")), ("understand", ())):
        out = shutil.copytree(FOLDER / f"cache_{task}", tmp_path / task)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        args = ("--data", FOLDER / "data", "--model", FOLDER / "model", "--dtype", "float32")
        assert tool("cache_latents", *args, "--out", out, "--task", task, *options) == 0
        assert " 0 crops encoded" in capsys.readouterr().out
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.slow
def test_model_folder_and_adapter_give_the_same_numbers():
    for name, path, options in (
        ("model", FOLDER / "model", {}),
        ("adapter", FOLDER / "model", {"adapter": FOLDER / "adapter"}),
        ("adapter", FOLDER / "run", {}),
    ):
        model = janusflow_jax.load(path, dtype="float32", **options)
        expected = EXPECTED[name]
        same_latents(model.generate(**GENERATE), expected["latents"])
        assert model.chat(QUESTION, [IMAGE], max_new_tokens=8) == expected["answer"]
        if "encoded" in expected:
            same_latents(model.encode_image(IMAGE), expected["encoded"])
    with pytest.raises(AssertionError):  # the adapter makes a difference that these tests see
        same_latents(model.generate(**GENERATE), EXPECTED["model"]["latents"])


def test_the_run_exports_the_same_adapter(tmp_path, tool):
    args = ("--model", FOLDER / "run", "--adapter-only", "--out", tmp_path / "adapter")
    assert tool("export_checkpoint", *args) == 0
    got, want = (load_file(f / "adapter_model.safetensors") for f in (args[-1], FOLDER / "adapter"))
    assert got.keys() == want.keys() and len(want) == 12
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    about = [
        json.loads((f / "adapter_config.json").read_text()) for f in (args[-1], FOLDER / "adapter")
    ]
    assert about[0] == about[1]


def test_prepare_data_knows_its_own_data_set(tmp_path, tool, capsys):
    out = shutil.copytree(FOLDER / "data", tmp_path / "data")
    lengths = sorted(p.name for p in (out / "lengths").iterdir())
    args = ("folder", FOLDER / "images", "--out", out, "--tokenizer", HUB)
    args = (*args, "--heldout", 0.25, "--workers", 1)
    assert tool("prepare_data", *args) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert tool("prepare_data", *args, "--overwrite") == 0, capsys.readouterr().err
    assert sorted(p.name for p in (out / "lengths").iterdir()) == lengths
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads((FOLDER / "data" / "report.json").read_text())
    assert report["records"] == {"train": 20, "heldout": 4}
    # a data set that another program made is not removed
    info = out / "dataset_info.json"
    info.write_text(info.read_text().replace("janusflow_jax", "another_package"))
    assert tool("prepare_data", *args, "--overwrite") == 1
    assert info.exists()
