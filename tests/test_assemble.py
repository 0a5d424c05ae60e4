"""The start of stage 1 from downloaded parts: torch's numbers, and rows for the tags."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, published
from helpers.parts import PARTS, llm_folder, logits
from safetensors.numpy import load_file, save_file

from janusflow_jax import hub, pipeline
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import ConvertError, JanusFlowError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import assemble_parts, names, source, tensors as hub_tensors
from janusflow_jax.models import janusflow

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
OPTIONS = {"gen_width": 32, "log": lambda line: None}


def expected(name):
    return load_file(PARTS / "expected.safetensors")[name]


@pytest.fixture
def llm(tmp_path):
    return llm_folder(tmp_path / "llama")


def to_timm(tensors, prefix=""):
    """transformers' SigLIP under timm's names."""
    out = {
        "pos_embed": tensors["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": tensors["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": tensors["embeddings.patch_embedding.bias"],
        "attn_pool.latent": tensors["head.probe"],
    }
    for kind in ("weight", "bias"):
        for i in range(2):
            block, theirs = f"blocks.{i}", f"encoder.layers.{i}"
            qkv = [tensors[f"{theirs}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            out[f"{block}.attn.qkv.{kind}"] = np.concatenate(qkv)
            out[f"{block}.attn.proj.{kind}"] = tensors[f"{theirs}.self_attn.out_proj.{kind}"]
            for n in (1, 2):
                out[f"{block}.norm{n}.{kind}"] = tensors[f"{theirs}.layer_norm{n}.{kind}"]
                out[f"{block}.mlp.fc{n}.{kind}"] = tensors[f"{theirs}.mlp.fc{n}.{kind}"]
        out[f"norm.{kind}"] = tensors[f"post_layernorm.{kind}"]
        packed = tensors[f"head.attention.in_proj_{kind}"]
        out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = packed[:32], packed[32:]
        out[f"attn_pool.proj.{kind}"] = tensors[f"head.attention.out_proj.{kind}"]
        out[f"attn_pool.norm.{kind}"] = tensors[f"head.layernorm.{kind}"]
        for n in (1, 2):
            out[f"attn_pool.mlp.fc{n}.{kind}"] = tensors[f"head.mlp.fc{n}.{kind}"]
    return {f"{prefix}{n}": np.ascontiguousarray(x) for n, x in out.items()}


def siglip_folder(form, out):
    """'hf', 'hf-model' (with prefix, text tower and loss), 'timm' or 'open_clip'."""
    shutil.copytree(PARTS / "siglip", out)
    tensors = load_file(out / "model.safetensors")
    other = {"text_model.x": np.zeros(2, np.float32), "logit_scale": np.zeros(1, np.float32)}
    if form == "hf-model":
        tensors = {f"vision_model.{n}": x for n, x in tensors.items()} | other
        vision = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(
            json.dumps({"model_type": "siglip", "vision_config": vision})
        )
    if form in ("timm", "open_clip"):
        config = {"architecture": "vit_tiny_siglip", "model_args": {"num_heads": 2}}
        (out / "config.json").write_text(json.dumps(config))
        tensors = to_timm(tensors, "visual.trunk." if form == "open_clip" else "")
    if form == "open_clip":
        (out / "model.safetensors").unlink()
        renamed = {n.replace("text_model", "text"): x for n, x in other.items()}
        save_file(tensors | renamed, out / "open_clip_model.safetensors")
    else:
        save_file(tensors, out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("start")
    parts = llm_folder(tmp / "llama"), siglip_folder("hf", tmp / "siglip"), golden.TINY / "vae"
    hub.assemble(*parts, tmp / "model", **OPTIONS)
    return tmp / "model"


@pytest.mark.slow
def test_the_language_model_computes_what_torch_does(start):
    """Grouped heads, tied embeddings, another theta and eps, and a table that grew."""
    loaded = model_folder.load_model(start)
    assert (loaded.cfg.llm.num_kv_heads, loaded.cfg.llm.rope_theta) == (2, 5000.0)
    assert (loaded.cfg.llm.norm_eps, loaded.cfg.llm.vocab_size) == (1e-5, 640)
    got, want = logits(loaded, jnp.asarray(expected("tokens"), jnp.int32)), expected("logits")
    assert golden.error(got[..., :616], want) < golden.PART
    table, head = loaded.params["llm"]["embedding"], loaded.params["llm"]["head"]["kernel"]
    np.testing.assert_array_equal(head, table.T)
    np.testing.assert_allclose(table[616:], np.tile(table[:616].mean(0), (24, 1)), atol=1e-6)


def test_the_tags_get_the_next_free_ids(start):
    chat = chat_format.ChatFormat.load(start / "hub")
    assert not chat.added_tags, "they are in the tokenizer's file now"
    ids = (chat.image_id, chat.gen_id, chat.image_start_id, chat.image_end_id)
    assert ids == (616, 617, 618, 619)
    assert chat.num_image_tokens == 4 and chat.vocab_needed == 620
    old = chat_format.ChatFormat.load(golden.TINY / "janusflow")
    assert chat.generation_ids("a red apple") == old.generation_ids("a red apple")


@pytest.mark.slow
def test_the_start_runs_as_a_whole(start):
    model = pipeline.load(str(start))
    assert model.generate("a red apple", num_steps=1, output="numpy").shape == (1, 32, 32, 3)
    assert isinstance(model.chat("Hello", max_new_tokens=2), str)


@pytest.mark.slow
def test_new_parts_are_fresh_and_an_export_has_every_tensor(start, tmp_path):
    loaded = model_folder.load_model(start)
    init = jax.jit(janusflow.init_params, static_argnums=0)
    fresh = init(loaded.cfg, jax.random.key(0))
    assert loaded.params.keys() == fresh.keys()
    for part in fresh.keys() - {"llm", "und_encoder"}:
        close = functools.partial(np.testing.assert_allclose, atol=1e-6)
        jax.tree.map(close, loaded.params[part], fresh[part])
    hub.export(start, tmp_path / "out", log=lambda line: None)
    out = load_file(tmp_path / "out" / "model.safetensors")
    shapes, rules = hub_tensors.published_shapes(loaded.cfg), names.janusflow_rules(loaded.cfg)
    assert out.keys() == hub_tensors.to_torch(shapes, rules).keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["language_config"]["max_position_embeddings"] == 128, "the Llama's own"


@pytest.mark.parametrize("form", ["hf", "hf-model", "timm", "open_clip"])
def test_siglip_in_every_naming_computes_what_torch_does(form, tmp_path):
    opened = source.Source(siglip_folder(form, tmp_path / form))
    cfg, rules, pool = assemble_parts.open_siglip(opened, log=lambda line: None)
    module = janusflow.siglip.Siglip(cfg)
    pixels = jnp.asarray(golden.nhwc(expected("pixels")))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), pixels)["params"])
    want = {"und_encoder": shapes}
    hub_tensors.check(opened.tensors, rules, want, opened.folder)
    params = hub_tensors.from_torch(opened.tensors, rules, want)["und_encoder"]
    got = module.apply({"params": params}, pixels)
    assert golden.error(got, expected("features")) < golden.PART
    if form in ("timm", "open_clip"):
        timm = to_timm(load_file(PARTS / "siglip" / "model.safetensors"), names.TOWER)
        assert pool.keys() == {n for n in timm if names.POOL in n} and len(pool) == 13
        for name, x in pool.items():
            np.testing.assert_array_equal(x, timm[name])
    else:
        assert not pool


def test_an_untied_head_stays_its_own():
    rng = np.random.default_rng(0)
    llm = {"embedding": rng.normal(size=(5, 3)), "head": {"kernel": rng.normal(size=(3, 5))}}
    got = assemble_parts.with_tags(llm, 8, [5, 6])
    np.testing.assert_array_equal(got["head"]["kernel"][:, :5], llm["head"]["kernel"])
    np.testing.assert_allclose(got["head"]["kernel"][:, 7], llm["head"]["kernel"].mean(1), 1e-5)
    np.testing.assert_allclose(got["embedding"][5], llm["embedding"].mean(0), 1e-5)


def test_tags_in_spare_rows_are_initialized_too():
    rng = np.random.default_rng(0)
    llm = {"embedding": rng.normal(size=(8, 3)), "head": {"kernel": rng.normal(size=(3, 8))}}
    got = assemble_parts.with_tags(llm, 8, [5, 6])
    table, head = got["embedding"], got["head"]["kernel"]
    np.testing.assert_allclose(table[5:7], np.tile(llm["embedding"][:5].mean(0), (2, 1)))
    np.testing.assert_allclose(head[:, 6], llm["head"]["kernel"][:, :5].mean(1))
    for i in (0, 4, 7):  # 7: a spare row that no token uses
        np.testing.assert_array_equal(table[i], llm["embedding"][i])
        np.testing.assert_array_equal(head[:, i], llm["head"]["kernel"][:, i])


@pytest.mark.parametrize(
    ("token", "config", "bos"),
    [
        (BOS, {}, BOS),  # SmolLM2's form: it has one and does not add it
        (None, {"bos_token_id": 6}, "<｜▁pad▁｜>"),  # Qwen's form: the config alone has it
        (None, {"bos_token_id": 40}, EOS),  # no special token: a default that was saved
        (None, {}, EOS),
    ],
)
def test_a_tokenizer_without_bos_gets_one(llm, tmp_path, token, config, bos):
    published.edit(llm / "config.json", lambda values: values.update(config))
    form = {"bos_token": token, "add_bos_token": None, "tokenizer_class": "Qwen2Tokenizer"}
    published.edit(llm / "tokenizer_config.json", lambda values: values.update(form))
    published.edit(llm / "tokenizer.json", lambda values: values.update(post_processor=None))
    (llm / "special_tokens_map.json").write_text('{"bos_token": null}')
    assert not chat_format.ChatFormat.load(llm, 4).add_bos
    lines = []
    tower = siglip_folder("hf", tmp_path / "siglip")
    out = tmp_path / "model"
    hub.assemble(llm, tower, golden.TINY / "vae", out, **OPTIONS | {"log": lines.append})
    chat = chat_format.ChatFormat.load(out / "hub")
    assert chat.head == 1 and chat.tokenizer.id_to_token(chat.bos_id) == bos
    assert any(repr(bos) in line for line in lines)


def test_the_parts_inside_a_deepseek_vl(llm, start, tmp_path):
    """One folder has the language model and the tower; what it says of its images is not ours."""
    folder = tmp_path / "vl"
    shutil.copytree(llm, folder)
    tower = to_timm(load_file(PARTS / "siglip" / "model.safetensors"), assemble_parts.VL_TOWER)
    inner = load_file(llm / "model.safetensors")
    inner = {f"language_model.{n}": x for n, x in inner.items()}
    other = {"aligner.layers.0.weight": np.zeros((2, 2), np.float32)}
    save_file(tower | inner | other, folder / "model.safetensors")
    config = json.loads((llm / "config.json").read_text())
    vision = {"cls": "CLIPVisionTower", "params": {"model_name": "siglip_large_patch16_384"}}
    outer = {"model_type": "multi_modality", "language_config": config, "vision_config": vision}
    outer["model_args"] = {"num_heads": 2}  # the real tower's are known by its width
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "preprocessor_config.json").write_text('{"image_size": 384}')
    processor = {"image_tag": "<image_placeholder>", "num_image_tokens": 576}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    hub.assemble(folder, folder, golden.TINY / "vae", tmp_path / "model", **OPTIONS)
    got, want = (model_folder.load_model(path) for path in (tmp_path / "model", start))
    assert got.cfg == want.cfg
    for part in ("llm", "und_encoder"):
        jax.tree.map(np.testing.assert_array_equal, got.params[part], want.params[part])
    assert json.loads((got.hub / "llm_config.json").read_text()) == config
    assert not (got.hub / "preprocessor_config.json").exists()
    assert chat_format.ChatFormat.load(got.hub).num_image_tokens == 4


def test_new_vectors_have_the_size_of_a_tables_rows():
    tree = {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}
    for part in ("und_aligner", "gen_aligner"):
        assert assemble_parts.scale_vectors(part, tree, 0.1)["kernel"].max() == np.float32(0.1)
    assert assemble_parts.scale_vectors("gen_head", tree, 0.1) is tree
    encoder = {"time_embed": {"linear_1": tree, "linear_2": tree}, "in_conv": tree}
    scaled = assemble_parts.scale_vectors("gen_encoder", encoder, 0.1)
    assert scaled["time_embed"]["linear_2"]["bias"].max() == np.float32(0.1)
    assert scaled["time_embed"]["linear_1"] is tree and scaled["in_conv"] is tree


def test_tensors_that_do_not_fit_are_named(llm, tmp_path):
    tower = siglip_folder("hf", tmp_path / "siglip")
    tensors = load_file(tower / "model.safetensors")
    del tensors["post_layernorm.bias"]
    save_file(tensors | {"stranger": np.zeros(2, np.float32)}, tower / "model.safetensors")
    tensors = load_file(llm / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, llm / "model.safetensors")
    with pytest.raises(ConvertError) as error:
        hub.assemble(llm, tower, golden.TINY / "vae", tmp_path / "model", **OPTIONS)
    for part in (
        "(2 problems)",
        "stranger: unknown",
        "post_layernorm.bias: missing; expected shape (32,)",
    ):
        assert part in str(error.value), part
    assert not (tmp_path / "model").exists()


def test_a_tower_of_another_form_is_refused(llm, tmp_path):
    tower = siglip_folder("timm", tmp_path / "siglip")
    tensors = load_file(tower / "model.safetensors")
    weight = tensors["patch_embed.proj.weight"]
    tensors["patch_embed.proj.weight"] = weight.reshape(len(weight), -1)  # as in SigLIP 2's NaFlex
    save_file(tensors, tower / "model.safetensors")
    with pytest.raises(ConvertError, match="expected a SigLIP of fixed image size; patch_embed"):
        hub.assemble(llm, tower, golden.TINY / "vae", tmp_path / "model", **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected one of .*; got 'yarn'"),
        ({"attention_bias": True}, r"q_proj.bias: missing; expected shape \(32,\)"),
        ({"model_type": "gpt2"}, "model_type: expected one of llama, .*; got 'gpt2'"),
        ({"num_key_value_heads": 3}, "num_heads: expected a multiple"),
        ({"vocab_size": 700}, r"embed_tokens\.weight: expected shape \(700, 32\)"),
    ],
)
def test_a_language_model_of_another_kind(change, message, llm, tmp_path):
    config = json.loads((llm / "config.json").read_text()) | change
    (llm / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=message):
        hub.assemble(
            llm,
            siglip_folder("hf", tmp_path / "siglip"),
            golden.TINY / "vae",
            tmp_path / "model",
            **OPTIONS,
        )


@pytest.mark.parametrize("wrong", [0, -1, "abc", math.nan, [], 10**9, True], ids=str)
@pytest.mark.parametrize(
    ("form", "field"),
    [
        ("hf", "num_hidden_layers"),
        ("hf-model", "num_attention_heads"),
        ("hf-model", "layer_norm_eps"),
        ("timm", "num_heads"),
    ],
)
def test_a_number_that_no_tower_has_is_named(llm, tmp_path, form, field, wrong):
    tower = siglip_folder(form, tmp_path / "siglip")
    config = json.loads((tower / "config.json").read_text())
    config.get("model_args", config.get("vision_config", config))[field] = wrong
    (tower / "config.json").write_text(json.dumps(config))
    if wrong in (0, []) and form == "timm" or (wrong == 10**9 and field == "layer_norm_eps"):
        return  # timm: as if it were missing; any positive number may be an epsilon
    with pytest.raises(JanusFlowError, match=field if wrong != 10**9 else "config|num_heads"):
        hub.assemble(llm, tower, golden.TINY / "vae", tmp_path / "model", **OPTIONS)
