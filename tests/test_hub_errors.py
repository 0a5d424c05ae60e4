"""Bad published folders: every kind gets an error that names the file and the reason."""

import json
import math
import shutil
import time

import ml_dtypes
import numpy as np
import pytest
from helpers import golden
from helpers.published import edit, shard, to_model
from safetensors.numpy import load_file, save_file

from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import CheckpointError, ConvertError, JanusFlowError
from janusflow_jax.parallel import trees

# Each entry breaks one thing; the message must say where and what.


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


def _lost_shard(f, v):
    (f / shard(f)[1]).unlink()


def _not_in_index(f, v):
    files = shard(f)
    save_file(load_file(f / files[0]) | {"stray": np.zeros(2)}, f / files[0])


def _integers(f, v):
    tensors = load_file(f / "model.safetensors")
    tensors["beg_of_und_embed"] = tensors["beg_of_und_embed"].astype(np.int64)
    save_file(tensors, f / "model.safetensors")


def _float8(f, v):
    tensors = load_file(f / "model.safetensors")
    tensors["beg_of_und_embed"] = tensors["beg_of_und_embed"].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, f / "model.safetensors")


def _small_table(f, v):
    tensors = load_file(f / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = tensors[name][:600]
    save_file(tensors, f / "model.safetensors")
    edit(f / "config.json", lambda c: c["language_config"].update(vocab_size=600))


def _no_tokenizer(f, v):
    (f / "tokenizer.json").unlink()


def _in_two_shards(f, v):
    files = shard(f)
    more = {"beg_of_und_embed": np.zeros((1, 64), np.float32)}
    for file in files:
        save_file(load_file(f / file) | more, f / file)


def _mixed_types(f, v):
    tensors = load_file(f / "model.safetensors")
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, f / "model.safetensors")


def _list_for_config(f, v):
    (f / "config.json").write_text("[]")


def _text_for_a_width(f, v):
    edit(f / "config.json", lambda c: c["language_config"].update(hidden_size="64"))


def _no_params(f, v):
    edit(f / "config.json", lambda c: c["vision_und_enc_config"].pop("params"))


def _other_positions(f, v):
    edit(f / "processor_config.json", lambda c: c.update(num_image_tokens=4))


BAD = {
    _truncated: r"model\.safetensors: expected a safetensors file; download it again",
    _flipped_header: r"model\.safetensors: expected a safetensors file.*header",
    _empty_file: r"diffusion_pytorch_model\.safetensors: expected a safetensors file",
    _lfs: r"Git LFS pointer",
    _empty: r"expected model\.safetensors or .*got \[\]",
    _gone: r"vae: no such folder",
    _bin: r"pytorch_model\.bin.*weights_only=True.*save_file",
    _janus: r"config\.json: expected JanusFlow.*got Janus or Janus-Pro",
    _llama: r"config\.json: expected JanusFlow.*got llama",
    _bad_json: r"vae/config\.json: expected a JSON file",
    _lost_shard: r"No such file.*model-00002-of-00003\.safetensors",
    _not_in_index: r"stray: unknown; its shape is \(2,\)",
    _integers: r"beg_of_und_embed: expected floating-point numbers; got int64",
    _float8: r"dtype 'F8_E4M3' is not supported",
    _small_table: r"ids below 600",
    _no_tokenizer: r"missing tokenizer\.json",
    _in_two_shards: r"model-0000\d-of-00003\.safetensors: beg_of_und_embed is in another shard",
    _mixed_types: r"choose a dtype.*\n.*layers\.1.*expected float32.*; got float16",
    _list_for_config: r"config\.json: expected a JSON object; got list",
    _text_for_a_width: r"config\.json.*\n.*hidden_size: expected whole numbers .*; got '64'",
    _no_params: r"config\.json: vision_und_enc_config: params: expected a JSON object",
    _other_positions: r"num_image_tokens: expected \d+, .*; got 4",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__[1:])
def test_bad_folders_are_named_with_the_reason(spoil, folder, vae_folder, tmp_path):
    spoil(folder, vae_folder)
    with pytest.raises((JanusFlowError, FileNotFoundError), match=BAD[spoil]):
        to_model(folder, vae_folder, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


NUMBERS = {
    "language_config": (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim vocab_size rms_norm_eps rope_theta"
    ).split(),
    "vision_und_enc_config.params": "image_size width layers heads patch_size mlp_ratio".split(),
    "vision_gen_enc_config.params": "layers_in_middle norm_eps block_out_channels".split(),
    "janusflow_jax.repa": ["layer", "width"],
    "vae": (
        "block_out_channels layers_per_block norm_num_groups latent_channels scaling_factor"
    ).split(),
}
WRONG = {
    "zero": 0,
    "negative": -1,
    "text": "abc",
    "list": [],
    "object": {},
    "NaN": math.nan,
    "Infinity": math.inf,
    "huge": 1e300,
    "true": True,
    "10^9": 10**9,
    "10^30": 10**30,
}


@pytest.mark.parametrize("where", NUMBERS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_number_that_no_model_has_is_named(where, kind, folder, vae_folder, tmp_path):
    for field in NUMBERS[where]:
        file = (vae_folder if where == "vae" else folder) / "config.json"
        before = file.read_text()
        values = json.loads(before)
        node = values
        for name in where.split(".") if where != "vae" else ():
            node = node.setdefault(name, {})
        wrong = WRONG[kind]
        node[field] = [wrong] if field == "block_out_channels" and kind != "list" else wrong
        file.write_text(json.dumps(values))
        began = time.time()
        if kind == "10^9" and field in ("rope_theta", "width"):
            continue  # it can be
        with pytest.raises(JanusFlowError) as error:
            to_model(folder, vae_folder, tmp_path / "out")
        assert time.time() - began < 5
        if kind != "10^9":  # a size may be large: then the tensors do not fit
            assert field in str(error.value) and "config.json" in str(error.value), error.value
        file.write_text(before)


DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
HOSTILE = {
    "config.json": (DEEP, "[]", "3", "null", '""', "{}", "", "\0" * 64, '{"language_config": 3}'),
    "preprocessor_config.json": (DEEP, "[]", '{"image_size": "abc"}', '{"rescale_factor": []}'),
    "processor_config.json": (DEEP, "[]", '{"num_image_tokens": "abc"}'),
    "tokenizer.json": (DEEP, "[]", "{}", ""),
    "tokenizer_config.json": (DEEP, "[]", "3", ""),
    "model.safetensors.index.json": (
        DEEP,
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": []}}',
    ),
    "vae/config.json": (
        DEEP,
        "[]",
        '{"block_out_channels": 3}',
        '{"scaling_factor": null, "a": 1}',
    ),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in HOSTILE.items() for content in contents],
    ids=lambda text: text[:24],
)
def test_hostile_json_is_one_error(name, content, folder, vae_folder, tmp_path):
    file = vae_folder / "config.json" if name.startswith("vae/") else folder / name
    if "index" in name:
        (folder / "model.safetensors").unlink()
    file.write_text(content)
    with pytest.raises(JanusFlowError) as error:
        to_model(folder, vae_folder, tmp_path / "out")
    assert len(str(error.value)) < 4000 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 7, 10**6, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize("header", [DEEP, "{}", '{"a": 3}', "[]", ""], ids=lambda x: x[:8])
def test_a_hostile_header_of_safetensors_is_one_error(header, size, folder, vae_folder, tmp_path):
    text = header.encode()
    (folder / "model.safetensors").write_bytes((size or len(text)).to_bytes(8, "little") + text)
    with pytest.raises(JanusFlowError, match="safetensors|do not fit"):
        to_model(folder, vae_folder, tmp_path / "out")


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_scaling_factor_is_said(folder, vae_folder, tmp_path, missing):
    if missing:
        edit(vae_folder / "config.json", lambda c: c.pop("scaling_factor"))
    lines: list[str] = []
    cfg = to_model(folder, vae_folder, tmp_path / "model", log=lines.append)
    remarks = [line for line in lines if "scaling_factor: " in line]
    assert len(remarks) == missing
    assert cfg.vae.scaling_factor == (0.18215 if missing else 0.13025)
    assert all("0.18215" in x and "0.13025" in x and str(vae_folder) in x for x in remarks)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.mlp.down_proj.weight",
        "vision_gen_dec_aligner.bias",
        "decoder.conv_in.bias",
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(folder, vae_folder, tmp_path, name, value, dtype):
    file = folder / "model.safetensors"
    if name.startswith("decoder"):
        file = vae_folder / "diffusion_pytorch_model.safetensors"
    tensors = {n: x.astype(dtype) for n, x in load_file(file).items()}
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(ConvertError, match=name):
        to_model(folder, vae_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["params", "vae"])
def test_a_model_that_is_not_finite_does_not_load(folder, vae_folder, tmp_path, part):
    to_model(folder, vae_folder, tmp_path / "good")
    loaded = model_folder.load_model(tmp_path / "good")
    if part == "vae":
        trees.flatten(loaded.vae)["decoder/conv_in/bias"][0] = math.nan
    else:
        assert loaded.params is not None
        loaded.params["llm"]["norm"]["scale"][0] = math.inf
    model_folder.save_model(
        tmp_path / "bad",
        model_cfg=loaded.cfg,
        params=loaded.params,
        vae=loaded.vae,
        hub_files=loaded.hub,
        extra={},
    )
    with pytest.raises(CheckpointError, match=r"(norm/scale|vae/decoder/conv_in/bias)"):
        model_folder.load_model(tmp_path / "bad")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e4, 0.0, -0.0])
def test_what_is_finite(dtype, value):
    x = np.ones((600, 700), dtype)
    for array in (x, x.T, x[::2, ::3], x[:1, :1]):
        array[-1, -1] = value
        assert trees.is_finite(array) == math.isfinite(value)
        array[-1, -1] = 1
    assert trees.is_finite(np.zeros((0, 3), dtype))
    assert trees.is_finite(np.arange(5, dtype=np.int8))


def test_one_error_names_every_tensor_that_does_not_fit(folder, vae_folder, tmp_path):
    tensors = dict(golden.arrays("janusflow/model"))
    del tensors["vision_gen_dec_aligner.bias"]
    tensors["stranger"] = np.zeros(3)
    tensors["language_model.model.norm.weight"] = np.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConvertError) as error:
        to_model(folder, vae_folder, tmp_path / "model")
    for part in (
        "(3 problems)",
        "vision_gen_dec_aligner.bias: missing",
        "stranger: unknown",
        "language_model.model.norm.weight: expected shape (64,); got (5,)",
    ):
        assert part in str(error.value), part
    save_file(golden.arrays("janusflow/model"), folder / "model.safetensors")
    weights = vae_folder / "diffusion_pytorch_model.safetensors"
    more = {f"odd{i}": np.zeros(1) for i in range(30)}
    save_file(load_file(weights) | more, weights)
    with pytest.raises(ConvertError, match=r"vae/odd0: unknown.*(?s:.*)\.\.\. and 10 more"):
        to_model(folder, vae_folder, tmp_path / "model")
