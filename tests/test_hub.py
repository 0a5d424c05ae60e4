"""Published folders are converted and exported again: every bit, and nothing half done."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import golden
from helpers.published import SILENT, shard, to_model
from safetensors.numpy import load_file, save as safetensors_bytes, save_file

from janusflow_jax import config, hub, pipeline
from janusflow_jax.checkpoints import model_folder, run as run_checkpoints
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import (
    configs as hub_configs,
    export_janusflow,
    names as hub_names,
    safetensors as safetensors_io,
    tensors as hub_tensors,
)


def same_bits(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert got[name].tobytes() == x.tobytes(), name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", out)
    return out


@pytest.fixture(scope="module")
def loaded(model):
    return pipeline.load(str(model))


def test_a_converted_model_samples_the_golden_numbers(loaded):
    case = golden.facts("expected")["samples"][1]
    want = golden.arrays("expected")["sample1.trajectory"]
    got = loaded.generate(
        [case["prompt"]] * len(want[0]),
        noise=golden.nhwc(want[0]),
        num_steps=len(want) - 1,
        guidance_scale=case["cfg_weight"],
        output="trajectory",
    )
    assert golden.error(got, golden.nhwc(want)) < 5e-6


def test_a_converted_model_answers_as_the_golden_one(loaded):
    case = golden.facts("expected")["chat"][0]
    images = [golden.TINY / "images" / name for name in case["images"]]
    got = loaded.chat(case["conversation"], images, max_new_tokens=24)
    assert got == golden.facts("expected")["greedy_text"][0].strip()


def test_both_forms_of_the_tokenizer_give_the_same_ids(folder, tmp_path):
    for file in (golden.TINY / "tokenizer_bos_by_config").iterdir():
        shutil.copy(file, folder)
    to_model(folder, golden.TINY / "vae", tmp_path / "model")
    chat = chat_format.ChatFormat.load(tmp_path / "model" / "hub")
    for case in golden.facts("expected")["samples"]:
        assert [*chat.generation_ids(case["prompt"]), chat.gen_id] == case["input_ids"]
    for case in golden.facts("expected")["tokenize"]:
        assert golden.token_ids(chat, case["text"]) == case["ids"]


def test_export_gives_every_bit_and_every_file_back(model, tmp_path):
    out = tmp_path / "back"
    hub.export(model, out, **SILENT)
    same_bits(load_file(out / "model.safetensors"), golden.arrays("janusflow/model"))
    weights = "diffusion_pytorch_model"
    same_bits(load_file(out / "vae" / f"{weights}.safetensors"), golden.arrays(f"vae/{weights}"))
    for file in (golden.TINY / "janusflow").glob("*.json"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert (out / "vae/config.json").read_bytes() == (golden.TINY / "vae/config.json").read_bytes()
    assert not (out / "unused.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


def test_bfloat16_shards_there_and_back(folder, vae_folder, tmp_path):
    """Mixed with float32 where no stack is: the source's types come back one by one."""
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in golden.arrays("janusflow/model").items()}
    name = "vision_gen_dec_aligner.bias"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    shard(folder)
    to_model(folder, vae_folder, tmp_path / "model")
    hub.export(tmp_path / "model", tmp_path / "back", shard_bytes=300_000, **SILENT)
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    same_bits({n: x for f in files for n, x in load_file(tmp_path / "back" / f).items()}, tensors)
    opened = safetensors_io.open_folder(model_folder.epath.Path(tmp_path / "back"))
    assert opened.keys() == tensors.keys()
    meta = json.loads((tmp_path / "model" / "model.json").read_text())
    assert meta["source_dtypes"]["janusflow"][name] == "float32"
    assert meta["source_dtypes"]["vae"] == "float32"
    assert len(meta["source_sha256"]["janusflow"]) == 3


@pytest.mark.slow
def test_dtype_casts_and_an_export_remembers_the_source(folder, vae_folder, tmp_path):
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in golden.arrays("janusflow/model").items()}
    save_file(tensors, folder / "model.safetensors")
    to_model(folder, vae_folder, tmp_path / "model", dtype="float32")
    got = model_folder.load_model(tmp_path / "model")
    assert {x.dtype for x in jax.tree.leaves([got.params, got.vae])} == {np.dtype("float32")}
    hub.export(tmp_path / "model", tmp_path / "back", **SILENT)
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_licenses_are_copied(folder, vae_folder, tmp_path):
    (folder / "LICENSE-MODEL").write_text("the model license")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: deepseek\n---\n# card\n")
    (vae_folder / "LICENSE.md").write_text("the vae's")
    to_model(folder, vae_folder, tmp_path / "model")
    hub.export(tmp_path / "model", tmp_path / "back", **SILENT)
    assert (tmp_path / "back" / "LICENSE-MODEL").read_text() == "the model license"
    assert (tmp_path / "back" / "vae" / "LICENSE.md").read_text() == "the vae's"
    card = (tmp_path / "back" / "README.md").read_text()
    assert card.startswith("---\n") and "license_name: deepseek" in card.split("---")[1]
    assert "- janusflow: deepseek (`LICENSE-MODEL`)" in card and "`vae/LICENSE.md`" in card


def test_nothing_is_overwritten_unasked(model, tmp_path):
    before = (model / "checksums.json").read_bytes()
    for run in (
        lambda: to_model(golden.TINY / "janusflow", golden.TINY / "vae", model),
        lambda: hub.export(model, model, **SILENT),
    ):
        with pytest.raises(CheckpointError):
            run()
    assert (model / "checksums.json").read_bytes() == before
    (tmp_path / "there").mkdir()
    out = tmp_path / "there"
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", out, overwrite=True)
    model_folder.load_model(out)


@pytest.mark.parametrize("command", ["convert", "assemble", "export"])
@pytest.mark.parametrize("out", ["other", "source", "source/vae", "source/out", "."])
def test_overwriting_spares_what_the_command_did_not_write(model, tmp_path, command, out):
    for name in ("other", "source/vae"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "thesis.tex").write_text("years of work")
    source, target = tmp_path / "source", tmp_path / out
    if command == "export" and out == "other":
        source = model
    run = {
        "convert": lambda: to_model(source, source / "vae", target, overwrite=True),
        "assemble": lambda: hub.assemble(
            source, source, source / "vae", target, overwrite=True, **SILENT
        ),
        "export": lambda: hub.export(source, target, overwrite=True, **SILENT),
    }[command]
    with pytest.raises(CheckpointError, match=str(target)):
        run()
    for name in ("other", "source/vae"):
        assert (tmp_path / name / "thesis.tex").exists()


def test_a_readme_beside_a_model_is_not_overwritten(tmp_path):
    convert = lambda: to_model(  # noqa: E731
        golden.TINY / "janusflow", golden.TINY / "vae", tmp_path / "m", overwrite=True
    )
    convert()
    (tmp_path / "m" / "README.md").write_text("notes of weeks")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        convert()
    assert (tmp_path / "m" / "README.md").read_text() == "notes of weeks"


def test_an_export_replaces_an_export(model, tmp_path):
    for _ in range(2):
        hub.export(model, tmp_path / "out", overwrite=True, **SILENT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "eval.json", "mine.safetensors", "a.model"])
def test_an_export_with_a_file_of_the_user_is_not_replaced(model, tmp_path, name):
    hub.export(model, tmp_path / "out", **SILENT)
    (tmp_path / "out" / name).write_text("years of work")
    with pytest.raises(CheckpointError, match=name):
        hub.export(model, tmp_path / "out", overwrite=True, **SILENT)
    assert (tmp_path / "out" / name).read_text() == "years of work"


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    real, seen = hub_tensors.from_torch, []

    def broken(tensors, rules, *args):
        seen.append(rules)
        if len(seen) == 4:
            raise OSError("the disk is gone")
        return real(tensors, rules, *args)

    monkeypatch.setattr(hub_tensors, "from_torch", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        to_model(golden.TINY / "janusflow", golden.TINY / "vae", tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_nothing_that_loads(number, tmp_path):
    source = golden.TINY
    command = [
        sys.executable,
        "tools/convert_checkpoint.py",
        "--janusflow",
        str(source / "janusflow"),
        "--vae",
        str(source / "vae"),
        "--out",
        str(tmp_path / "model"),
    ]
    root = golden.ROOT.parents[2]
    process = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("gen_encoder"):
            break
    time.sleep(0.05)
    process.send_signal(number)
    process.wait(30)
    left = list(tmp_path.iterdir())
    assert not (tmp_path / "model").exists()
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    for path in left:
        with pytest.raises(CheckpointError):
            model_folder.load_model(path)


def test_parts_are_read_one_after_another(tmp_path, monkeypatch):
    """No tensor of a part is read before the part before it was saved and dropped."""
    log, alive = [], []
    real_read, real_save = safetensors_io._read_tensor, model_folder._save_tree

    def read(*args):
        log.append("read")
        return real_read(*args)

    def save(path, tree):
        assert not [x for x in alive if x() is not None], "the part before is still in memory"
        alive[:] = [weakref.ref(x) for x in jax.tree.leaves(tree)]
        log.append(path.name)
        real_save(path, tree)

    monkeypatch.setattr(safetensors_io, "_read_tensor", read)
    monkeypatch.setattr(model_folder, "_save_tree", save)
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", tmp_path / "model")
    saves = [x for x in log if x != "read"]
    parts = hub_tensors.published_shapes(config.model_config("test"))
    assert sorted(saves) == sorted([*parts, "vae"])
    counts = {}
    at = 0
    for x in log:
        if x == "read":
            at += 1
        else:
            counts[x], at = at, 0
    assert list(counts) == [*(p for p in config.MODEL_PARTS if p in parts), "vae"]
    assert counts["llm"] == 13 + 3 + 3 * 9  # the pooling head, which is small, comes first
    assert counts["und_begin"] == 1 and counts["vae"] == 244


@pytest.fixture(scope="module")
def born(tmp_path_factory):
    """A model that was never published: other sizes, its own REPA head, no pooling head."""
    cfg = config.model_config("test")
    cfg.llm.num_kv_heads, cfg.llm.rope_theta, cfg.und.mlp_width = 2, 5000.0, 200
    cfg.und.pixel_mean, cfg.und.pixel_std = (0.1, 0.2, 0.3), (1.0, 0.9, 0.8)
    out = tmp_path_factory.mktemp("born") / "model"
    rng = np.random.default_rng(0)
    draw = lambda t: jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), t)  # noqa: E731
    names = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")
    model_folder.save_model(
        out,
        model_cfg=cfg,
        params=draw(hub_tensors.janusflow.param_shapes(cfg)),
        vae=draw(hub_tensors.vae.param_shapes(cfg.vae)),
        hub_files={n: (golden.TINY / "janusflow" / n).read_bytes() for n in names},
        extra={},
    )
    return out, cfg


def test_a_model_born_here_comes_back_as_it_was(born, tmp_path):
    model, cfg = born
    hub.export(model, tmp_path / "out", license="apache-2.0", **SILENT)
    files = [json.loads((tmp_path / "out" / n).read_text()) for n in export_janusflow.CONFIGS]
    assert hub_configs.model_config_from_hf(*files) == cfg
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    to_model(tmp_path / "out", tmp_path / "out" / "vae", tmp_path / "again")
    a, b = model_folder.load_model(model), model_folder.load_model(tmp_path / "again")
    assert b.cfg == cfg
    del a.params["repa_head"]
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.vae), (b.params, b.vae))


@pytest.mark.slow
def test_an_export_needs_a_tokenizer_and_leaves_out_another_towers_head(born, tmp_path):
    model, cfg = born
    loaded = model_folder.load_model(model)
    files = {p.name: p.read_bytes() for p in loaded.hub.iterdir()}
    name = f"{hub_names.TOWER}{hub_names.POOL}latent"
    files["unused.safetensors"] = safetensors_bytes({name: np.zeros((1, 1, 2 * cfg.und.width))})
    fields = {"model_cfg": cfg, "params": loaded.params, "vae": loaded.vae, "extra": {}}
    model_folder.save_model(tmp_path / "other", hub_files=files, **fields)
    hub.export(tmp_path / "other", tmp_path / "out", **SILENT)
    assert name not in load_file(tmp_path / "out" / "model.safetensors")
    del files["tokenizer.json"]
    model_folder.save_model(tmp_path / "bare", hub_files=files, **fields)
    with pytest.raises(ConvertError, match=r"hub/tokenizer\.json is missing"):
        hub.export(tmp_path / "bare", tmp_path / "none", **SILENT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"und_encoder": "shared", "repa_target": "siglip"},
            r"no published format .*\(2 problems\)(?s:.*)und_encoder: .* 'siglip'; got 'shared'",
        ),
        ({}, r"parts .*'llm'.*'vae'.* missing"),
    ],
)
def test_what_no_published_format_can_hold(tmp_path, fields, message):
    cfg = dataclasses.replace(config.model_config("test"), **fields)
    model_folder.save_model(
        tmp_path / "model", model_cfg=cfg, params=None, vae=None, hub_files=None, extra={}
    )
    with pytest.raises(ConvertError, match=message):
        hub.export(tmp_path / "model", tmp_path / "out", **SILENT)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "params"])
def test_a_training_run_is_exported(weights, model, tmp_path):
    """A run that began from a converted model: its files, its own numbers, float32."""
    start = model_folder.load_model(model)
    cfg = config.TrainConfig(name="run", model=start.cfg)
    cfg.model.name = "mine"
    model_folder.save_model(
        tmp_path / "run" / "base",
        model_cfg=cfg.model,
        params=None,
        vae=start.vae,
        hub_files=start.hub,
        extra={},
    )
    ema = {"und_begin": jax.tree.map(lambda x: x + 1, start.params["und_begin"])}
    run = {"step": 7, "config": config.to_dict(cfg)}
    saver = run_checkpoints.RunCheckpoints(tmp_path / "run")
    saver.save(7, params=start.params, ema=ema, opt_state={}, run=run)
    saver.wait()
    hub.export(tmp_path / "run", tmp_path / "out", weights=weights, **SILENT)
    want = dict(golden.arrays("janusflow/model"))
    if weights == "ema":
        want["beg_of_und_embed"] = want["beg_of_und_embed"] + 1
    same_bits(load_file(tmp_path / "out" / "model.safetensors"), want)
    files = [json.loads((tmp_path / "out" / n).read_text()) for n in export_janusflow.CONFIGS]
    assert hub_configs.model_config_from_hf(*files) == cfg.model
    assert f"to step 7, `{weights}` weights" in (tmp_path / "out" / "README.md").read_text()
