"""What a report measured: model, the run's base, adapter, data."""

import json
import shutil
import types

import numpy as np
import pytest
from etils import epath
from helpers.runs import config
from PIL import Image

from janusflow_jax import cli, evaluate, generate
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.eval import provenance
from janusflow_jax.hub import adapters
from janusflow_jax.hub.safetensors import LazyTensor, write_folder
from janusflow_jax.training import heldout


def adapter(golden_folder, folder):
    """An adapter that does something to the golden model's q."""
    llm = model_folder.load_model(golden_folder).params["llm"]
    layers, width, out = llm["layers"]["block"]["attn"]["q"]["kernel"].shape
    shapes = {"A": (2, width), "B": (out, 2)}
    module = "base_model.model.language_model.model.layers.{}.self_attn.q_proj"
    tensors = {
        f"{module.format(i)}.lora_{k}.weight": LazyTensor(
            shape, np.dtype(np.float32), lambda shape=shape: np.full(shape, 0.1, np.float32)
        )
        for i in range(layers)
        for k, shape in shapes.items()
    }
    folder.mkdir()
    write_folder(epath.Path(folder), adapters.WEIGHTS, tensors)
    about = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    about["janusflow_jax"] = {"base_sha256": adapters.digest(llm, ["q"])}
    (folder / adapters.CONFIG).write_text(json.dumps(about))
    return folder


def run_folder(tmp_path):
    """What is read of a run: a finished checkpoint, and a base."""
    run = tmp_path / "run"
    step = run / "checkpoints" / "4"
    for folder, files in ((step, ("run.json", checksums.MARKER)), (run / "base", ("model.json",))):
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text("{}")
        checksums.write_sums(epath.Path(folder))
    return run


# --- what is hashed


def test_resolve_takes_the_newest_finished_checkpoint(tmp_path):
    assert provenance.resolve(str(tmp_path)) == tmp_path
    for step, done in ((2, True), (10, True), (12, False)):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        if done:
            (folder / checksums.MARKER).write_text("")
    assert provenance.resolve(str(tmp_path)).name == "10"


def test_a_runs_base_is_part_of_it(tmp_path, monkeypatch):
    run = run_folder(tmp_path)
    one = provenance.of(provenance.resolve(run))
    assert sorted(one) == ["base/checksums.json", "checksums.json", "run.json"]
    monkeypatch.chdir(run / "checkpoints")
    assert provenance.of("4") == one
    (run / "base" / "vae").write_text("another VAE")
    checksums.write_sums(epath.Path(run / "base"))
    two = provenance.of(provenance.resolve(run))
    assert {n for n in one if one[n] != two[n]} == {"base/checksums.json"}


def test_a_model_folder_is_itself_alone(tmp_path):
    run = run_folder(tmp_path)
    model = shutil.copytree(run / "base", run / "checkpoints" / "model")
    assert sorted(provenance.of(model)) == ["checksums.json", "model.json"]


def test_an_adapters_weights_and_config_count(golden_folder, tmp_path):
    folder = adapter(golden_folder, tmp_path / "adapter")
    sums = [provenance.of(golden_folder, folder)]
    for file in (adapters.CONFIG, f"{adapters.WEIGHTS}.safetensors"):
        (folder / file).write_bytes((folder / file).read_bytes() + b" ")
        sums.append(provenance.of(golden_folder, folder))
    assert len({x.pop("adapter") for x in sums}) == 3
    assert sums == [provenance.of(golden_folder)] * 3


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder of tools/prepare_openmoji\.py"):
        provenance.of_data(tmp_path / "none")


# --- what reports hold


@pytest.mark.slow
def test_held_out_losses_are_those_of_the_adapter(golden_folder, tmp_path, monkeypatch):
    folder = adapter(golden_folder, tmp_path / "adapter")
    kernels = []

    class Heldout:
        def __init__(self, *_):
            pass

        def measure(self, state):
            q = state["params"]["llm"]["layers"]["block"]["attn"]["q"]
            assert not any(parts_lib.is_lora_path(name) for name in q)
            kernels.append(np.asarray(q["kernel"]))
            return {"eval/a/loss_ar": float(np.abs(kernels[-1]).sum())}

    cfg = config("x")
    cfg.evaluate.sources = cfg.data.sources
    monkeypatch.setattr(heldout, "Heldout", Heldout)
    monkeypatch.setattr(evaluate.config_flags, "read_config", lambda path: cfg)
    command = ["--model", str(golden_folder), "--suite", "losses", "--config", "x.py"]
    reports = []
    for name, more in (("plain", []), ("adapted", ["--adapter", str(folder)])):
        out = tmp_path / f"{name}.json"
        evaluate.main([*command, "--out", str(out), *more])
        reports.append(json.loads(out.read_text()))
    want = adapters.apply(model_folder.load_model(golden_folder).params["llm"], folder)
    np.testing.assert_array_equal(kernels[1], want["layers"]["block"]["attn"]["q"]["kernel"])
    assert np.abs(kernels[1] - kernels[0]).max() > 0.01
    plain, adapted = reports
    assert plain["losses"] != adapted["losses"]
    assert (plain["settings"]["adapter"], adapted["settings"]["adapter"]) == ("", str(folder))
    assert adapted["model"] == {**plain["model"], "adapter": provenance.of_adapter(folder)}
    with pytest.raises(ConvertError, match="expected an adapter"):
        evaluate.main([*command, "--adapter", str(tmp_path / "none")])


def test_the_report_of_images_names_the_adapter(golden_folder, tmp_path, monkeypatch):
    folder = adapter(golden_folder, tmp_path / "adapter")
    model = types.SimpleNamespace(
        source="m",
        cfg=config("x").model,
        dtype="float32",
        prompt_ids=lambda prompts: [[1]] * len(prompts),
        generate=lambda *_, **__: [Image.new("RGB", (8, 8))],
    )
    monkeypatch.setattr(cli, "load", lambda args: model)
    report = tmp_path / "report.json"
    command = ["--model", "m", "--prompt", "x", "--out", str(tmp_path / "x.png")]
    generate.main([*command, "--json", str(report)])
    assert "adapter" not in json.loads(report.read_text())["model"]
    generate.main([*command, "--json", str(report), "--adapter", str(folder)])
    adapter_of_report = json.loads(report.read_text())["model"]["adapter"]
    assert adapter_of_report == {"path": str(folder), "sha256": provenance.of_adapter(folder)}
