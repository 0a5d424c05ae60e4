"""Published folders in and out again: every bit, every number, and errors that tell all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import golden
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from janusflow_jax import (
    checkpoint,
    config,
    convert,
    hub_config,
    hub_export,
    hub_import,
    pipeline,
    safetensor_files,
)
from janusflow_jax.convert import ConvertError
from janusflow_jax.data import chat_format

SILENT = {"say": lambda line: None}


def to_model(source, vae, out, **options):
    return hub_import.convert_janusflow(source, vae, out, **{**SILENT, **options})


def same_bits(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert got[name].tobytes() == x.tobytes(), name


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden folder that a test may change."""
    return shutil.copytree(golden.TINY / "janusflow", tmp_path / "janusflow")


@pytest.fixture
def vae_folder(tmp_path):
    return shutil.copytree(golden.TINY / "vae", tmp_path / "vae")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", out)
    return out


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard(folder, count=3):
    """Splits model.safetensors; returns the shards' names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = list(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {n: tensors[n] for n in names[i::count]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sorted(set(index.values()))


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
        cfg_weight=case["cfg_weight"],
        output="trajectory",
    )
    assert golden.error(got, golden.nhwc(want)) < 5e-6


def test_a_converted_model_says_the_golden_words(loaded):
    case = golden.facts("expected")["chat"][0]
    pictures = [golden.TINY / "images" / name for name in case["images"]]
    got = loaded.chat(case["conversation"], pictures, max_new_tokens=24)
    assert got == golden.facts("expected")["greedy_text"][0].strip()


def test_both_forms_of_the_tokenizer_give_the_same_ids(folder, tmp_path):
    for file in (golden.TINY / "tokenizer_bos_by_config").iterdir():
        shutil.copy(file, folder)
    to_model(folder, golden.TINY / "vae", tmp_path / "model")
    chat = chat_format.ChatFormat.load(tmp_path / "model" / "hub")
    for case in golden.facts("expected")["samples"]:
        assert [*chat.generation_ids(case["prompt"]), chat.gen_id] == case["input_ids"]
    for case in golden.facts("expected")["tokenize"]:
        assert chat.tokenize(case["text"]) == case["ids"]


def test_export_gives_every_bit_and_every_file_back(model, tmp_path):
    out = tmp_path / "back"
    hub_export.export(model, out, **SILENT)
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
    hub_export.export(tmp_path / "model", tmp_path / "back", shard_bytes=300_000, **SILENT)
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    same_bits({n: x for f in files for n, x in load_file(tmp_path / "back" / f).items()}, tensors)
    opened = safetensor_files.open_folder(checkpoint.epath.Path(tmp_path / "back"))
    assert not opened.problems and opened.tensors.keys() == tensors.keys()
    meta = json.loads((tmp_path / "model" / "model.json").read_text())
    assert meta["source_dtypes"]["janusflow"][name] == "float32"
    assert meta["source_dtypes"]["vae"] == "float32"
    assert len(meta["source_sha256"]["janusflow"]) == 3


def test_dtype_casts_and_an_export_remembers_the_source(folder, vae_folder, tmp_path):
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in golden.arrays("janusflow/model").items()}
    save_file(tensors, folder / "model.safetensors")
    to_model(folder, vae_folder, tmp_path / "model", dtype="float32")
    got = checkpoint.load_model(tmp_path / "model")
    assert {x.dtype for x in jax.tree.leaves([got.params, got.vae])} == {np.dtype("float32")}
    hub_export.export(tmp_path / "model", tmp_path / "back", **SILENT)
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_select_layer_of_a_published_folder(folder, tmp_path):
    """-2 keeps one block less; the file has no more, and one that has is refused."""
    edit(
        folder / "config.json",
        lambda c: c["vision_und_enc_config"]["params"].update(select_layer=-2),
    )
    with pytest.raises(ConvertError, match=r"unknown: vision_und_enc_model.*blocks\.1\."):
        to_model(folder, golden.TINY / "vae", tmp_path / "model")
    tensors = {
        n: x for n, x in golden.arrays("janusflow/model").items() if ".tower.blocks.1." not in n
    }
    tensors = {n: x for n, x in tensors.items() if "vision_tower.blocks.1." not in n}
    save_file(tensors, folder / "model.safetensors")
    cfg = to_model(folder, golden.TINY / "vae", tmp_path / "model")
    assert cfg.und.num_layers == 1
    params = checkpoint.load_model(tmp_path / "model").params
    assert params["und_encoder"]["layers"]["block"]["norm1"]["scale"].shape == (1, 48)
    hub_export.export(tmp_path / "model", tmp_path / "back", **SILENT)
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_other_files_of_a_vae_folder_are_ignored_with_a_line(vae_folder, tmp_path):
    save_file({"first_stage_model.x": np.zeros(3)}, vae_folder / "sdxl_vae.safetensors")
    (vae_folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    said = []
    to_model(golden.TINY / "janusflow", vae_folder, tmp_path / "model", say=said.append)
    text = "\n".join(said)
    assert "sdxl_vae.safetensors: not read" in text and "model.bin: not read" in text


def test_licences_travel(folder, vae_folder, tmp_path):
    (folder / "LICENSE-MODEL").write_text("the model licence")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: deepseek\n---\n# card\n")
    (vae_folder / "LICENSE.md").write_text("the vae's")
    to_model(folder, vae_folder, tmp_path / "model")
    hub_export.export(tmp_path / "model", tmp_path / "back", **SILENT)
    assert (tmp_path / "back" / "LICENSE-MODEL").read_text() == "the model licence"
    assert (tmp_path / "back" / "vae" / "LICENSE.md").read_text() == "the vae's"
    card = (tmp_path / "back" / "README.md").read_text()
    assert card.startswith("---\n") and "license_name: deepseek" in card.split("---")[1]
    assert "- janusflow: deepseek (`LICENSE-MODEL`)" in card and "`vae/LICENSE.md`" in card


# Bad folders. Each entry breaks one thing; the message must say where and what.


def _truncated(f, v):
    data = (f / "model.safetensors").read_bytes()
    (f / "model.safetensors").write_bytes(data[:-100])


def _flipped_header(f, v):
    data = bytearray((f / "model.safetensors").read_bytes())
    data[20] = 0
    (f / "model.safetensors").write_bytes(bytes(data))


def _empty_file(f, v):
    (v / "diffusion_pytorch_model.safetensors").write_bytes(b"")


def _lfs(f, v):
    (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")


def _empty(f, v):
    shutil.rmtree(f)
    f.mkdir()


def _gone(f, v):
    shutil.rmtree(v)


def _bin(f, v):
    (f / "model.safetensors").rename(f / "pytorch_model.bin")


def _janus(f, v):
    edit(
        f / "config.json",
        lambda c: (c.pop("vision_gen_enc_config"), c.update(gen_vision_config={})),
    )


def _llama(f, v):
    (f / "config.json").write_text('{"model_type": "llama"}')


def _bad_json(f, v):
    (v / "config.json").write_text("{")


def _doubled(f, v):
    files = shard(f)
    first, second = load_file(f / files[0]), load_file(f / files[1])
    name = next(iter(first))
    save_file(second | {name: first[name]}, f / files[1])


def _lost_shard(f, v):
    (f / shard(f)[1]).unlink()


def _not_in_index(f, v):
    files = shard(f)
    save_file(load_file(f / files[0]) | {"stray": np.zeros(2)}, f / files[0])


def _index_lies(f, v):
    shard(f)
    edit(
        f / "model.safetensors.index.json",
        lambda i: i["weight_map"].update(ghost=i["weight_map"]["beg_of_und_embed"]),
    )


def _integers(f, v):
    tensors = load_file(f / "model.safetensors")
    tensors["beg_of_und_embed"] = tensors["beg_of_und_embed"].astype(np.int64)
    save_file(tensors, f / "model.safetensors")


def _small_table(f, v):
    tensors = load_file(f / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = tensors[name][:600]
    save_file(tensors, f / "model.safetensors")
    edit(f / "config.json", lambda c: c["language_config"].update(vocab_size=600))


def _no_tokenizer(f, v):
    (f / "tokenizer.json").unlink()


def _half_a_pool(f, v):
    tensors = load_file(f / "model.safetensors")
    del tensors["vision_und_enc_model.vision_tower.attn_pool.latent"]
    save_file(tensors, f / "model.safetensors")


def _other_pictures(f, v):
    edit(f / "processor_config.json", lambda c: c.update(num_image_tokens=576))


BAD = {
    _truncated: r"model\.safetensors: truncated or damaged: expected \d+ bytes; got \d+",
    _flipped_header: r"model\.safetensors: its header is damaged",
    _empty_file: r"diffusion_pytorch_model\.safetensors: empty",
    _lfs: r"Git LFS pointer",
    _empty: r"(?s)found nothing: the folder is empty.*config\.json: missing",
    _gone: r"vae: no such folder",
    _bin: r"only pytorch_model\.bin.*python -c .*torch\.load\(.*weights_only=True.*save_file",
    _janus: r"config\.json: expected JanusFlow; it is Janus or Janus-Pro",
    _llama: r"it is a Llama \(--llm\)",
    _bad_json: r"vae/config\.json: expected a JSON file",
    _doubled: r"duplicate: \S+ is in model-00001-of-00003\.safetensors and in model-00002",
    _lost_shard: r"model-00002-of-00003\.safetensors: missing; model\.safetensors\.index\.json",
    _not_in_index: r"stray is not in the index",
    _index_lies: r"missing: ghost, which the index places in model-",
    _integers: r"type of beg_of_und_embed: expected floating-point numbers; got int64",
    _small_table: r"expected ids below 600",
    _no_tokenizer: r"missing tokenizer\.json",
    _half_a_pool: r"missing: vision_und_enc_model\.vision_tower\.attn_pool\.latent \[1, 1, 48\]",
    _other_pictures: r"num_image_tokens: expected 16 \(image_size 64\); got 576",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__[1:])
def test_bad_folders_are_named_with_the_reason(spoil, folder, vae_folder, tmp_path):
    spoil(folder, vae_folder)
    with pytest.raises(ConvertError, match=BAD[spoil]):
        to_model(folder, vae_folder, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def test_all_problems_of_both_folders_come_in_one_error(folder, vae_folder, tmp_path):
    tensors = dict(golden.arrays("janusflow/model"))
    del tensors["vision_gen_dec_aligner.bias"]
    tensors["stranger"] = np.zeros(3)
    tensors["language_model.model.norm.weight"] = np.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    weights = vae_folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"odd": np.zeros(1)}, weights)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConvertError) as error:
        to_model(folder, vae_folder, tmp_path / "model")
    for part in ("(5 problems)", "missing: vision_gen_dec", "unknown: stranger [3]",
                 "shape of language_model.model.norm.weight", "VAE: unknown: odd",
                 "missing tokenizer_config.json"):  # fmt: skip
        assert part in str(error.value), part


def test_nothing_is_overwritten_unasked(model, tmp_path):
    before = (model / "checksums.json").read_bytes()
    for run in (
        lambda: to_model(golden.TINY / "janusflow", golden.TINY / "vae", model),
        lambda: hub_export.export(model, model, **SILENT),
    ):
        with pytest.raises(checkpoint.CheckpointError, match="--overwrite"):
            run()
    assert (model / "checksums.json").read_bytes() == before
    (tmp_path / "there").mkdir()
    out = tmp_path / "there"
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", out, overwrite=True)
    checkpoint.load_model(out)


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    real, seen = convert.from_torch, []

    def broken(tensors, rules, *args):
        seen.append(rules)
        if len(seen) == 4:
            raise OSError("the disk is gone")
        return real(tensors, rules, *args)

    monkeypatch.setattr(convert, "from_torch", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        to_model(golden.TINY / "janusflow", golden.TINY / "vae", tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_nothing_that_loads(number, tmp_path):
    source = golden.TINY
    command = [
        sys.executable, "tools/convert_checkpoint.py", "--janusflow", str(source / "janusflow"),
        "--vae", str(source / "vae"), "--out", str(tmp_path / "model"),
    ]  # fmt: skip
    root = golden.ROOT.parents[2]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
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
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load_model(path)


def test_parts_are_read_one_after_another(tmp_path, monkeypatch):
    """No tensor of a part is read before the part before it was saved and dropped."""
    log, alive = [], []
    real_read, real_save = safetensor_files.LazyTensor.__array__, checkpoint._save_tree

    def read(self, *args, **kwargs):
        log.append("read")
        return real_read(self, *args, **kwargs)

    def save(path, tree):
        assert not [x for x in alive if x() is not None], "the part before is still in memory"
        alive[:] = [weakref.ref(x) for x in jax.tree.leaves(tree)]
        log.append(path.name)
        real_save(path, tree)

    monkeypatch.setattr(safetensor_files.LazyTensor, "__array__", read)
    monkeypatch.setattr(checkpoint, "_save_tree", save)
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", tmp_path / "model")
    saves = [x for x in log if x != "read"]
    assert (
        saves == [*convert.published_shapes(config.model_config("test")), "vae"] or len(saves) == 10
    )
    counts = {}
    at = 0
    for x in log:
        if x == "read":
            at += 1
        else:
            counts[x], at = at, 0
    assert list(counts) == [*(p for p in config.STAGE_PARTS if p != "repa_head"), "vae"]
    assert counts["llm"] == 13 + 3 + 3 * 9  # the pooling head, which is small, comes first
    assert counts["und_begin"] == 1 and counts["vae"] == 244


def test_old_model_folders_load(tmp_path):
    """Format 1: all parts in one Orbax folder."""
    model, params, vae = golden.model()
    out = tmp_path / "old"
    checkpoint.save_model(
        out, model_cfg=model.cfg, params=params, vae=vae, hub_files=None, extra={}
    )
    shutil.rmtree(out / "params")
    checkpoint._save_tree(checkpoint.epath.Path(out / "params"), jax.tree.map(np.asarray, params))
    edit(out / "model.json", lambda m: m.update(format=1))
    checkpoint.write_sums(checkpoint.epath.Path(out))
    got = checkpoint.load_model(out)
    jax.tree.map(np.testing.assert_array_equal, got.params, params)


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
    checkpoint.save_model(
        out,
        model_cfg=cfg,
        params=draw(convert.janusflow.param_shapes(cfg)),
        vae=draw(convert.vae.param_shapes(cfg.vae)),
        hub_files={n: (golden.TINY / "janusflow" / n).read_bytes() for n in names},
        extra={},
    )
    return out, cfg


def test_a_model_born_here_comes_back_as_it_was(born, tmp_path):
    model, cfg = born
    hub_export.export(model, tmp_path / "out", licence="apache-2.0", **SILENT)
    pool = load_file(tmp_path / "out" / "model.safetensors")
    pool = {n: x for n, x in pool.items() if ".attn_pool." in n}
    assert len(pool) == 13 and not any(x.any() for x in pool.values())
    files = [json.loads((tmp_path / "out" / n).read_text()) for n in hub_export.CONFIGS]
    assert hub_config.model_config_from_hf(*files) == cfg
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    to_model(tmp_path / "out", tmp_path / "out" / "vae", tmp_path / "again")
    a, b = checkpoint.load_model(model), checkpoint.load_model(tmp_path / "again")
    assert b.cfg == cfg
    del a.params["repa_head"]
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.vae), (b.params, b.vae))


def test_what_the_published_format_cannot_say(tmp_path):
    cfg = config.model_config("emoji")
    checkpoint.save_model(
        tmp_path / "model", model_cfg=cfg, params=None, vae=None, hub_files=None, extra={}
    )
    with pytest.raises(hub_export.ExportError) as error:
        hub_export.export(tmp_path / "model", tmp_path / "out", **SILENT)
    for part in ("gen.patch_size: the published format knows only 2; got 4", "'llm'", "'vae'",
                 "hub/tokenizer.json: missing"):  # fmt: skip
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_a_training_run_is_exported(weights, model, tmp_path):
    """A run that began from a converted model: its files, its own numbers, float32."""
    start = checkpoint.load_model(model)
    cfg = config.TrainConfig(name="run", model=start.cfg)
    cfg.model.name = "mine"
    checkpoint.save_model(
        tmp_path / "run" / "base", model_cfg=cfg.model, params=None, vae=start.vae,
        hub_files=start.hub, extra={},
    )  # fmt: skip
    ema = {"und_begin": jax.tree.map(lambda x: x + 1, start.params["und_begin"])}
    run = {"step": 7, "config": config.to_dict(cfg)}
    saver = checkpoint.RunCheckpoints(tmp_path / "run")
    saver.save(7, params=start.params, ema=ema, opt_state={}, run=run)
    saver.close()
    hub_export.export(tmp_path / "run", tmp_path / "out", weights=weights, **SILENT)
    want = dict(golden.arrays("janusflow/model"))
    if weights == "ema":
        want["beg_of_und_embed"] = want["beg_of_und_embed"] + 1
    same_bits(load_file(tmp_path / "out" / "model.safetensors"), want)
    files = [json.loads((tmp_path / "out" / n).read_text()) for n in hub_export.CONFIGS]
    assert hub_config.model_config_from_hf(*files) == cfg.model
    assert f"to step 7, `{weights}` weights" in (tmp_path / "out" / "README.md").read_text()
