"""The tables of names and layouts, and the config files, in both directions."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import golden, torch_trees
from safetensors.numpy import load_file, save_file

from janusflow_jax import config
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub import configs as hub_configs, names, source, tensors
from janusflow_jax.models import janusflow, vae


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def hub_files():
    read = lambda name: json.loads((golden.TINY / name).read_text())  # noqa: E731
    names = ("janusflow/config.json", "janusflow/preprocessor_config.json", "vae/config.json")
    return [read(name) for name in names]


def test_every_tensor_of_the_released_model_has_a_rule():
    published = json.loads((golden.ROOT / "janusflow_1p3b_tensors.json").read_text())
    used = {n: tuple(s) for n, s in published.items() if not torch_trees.is_pool(n)}
    cfg = config.model_config("1p3b")
    ours = tensors.to_torch(tensors.published_shapes(cfg), names.janusflow_rules(cfg))
    assert (len(published), len(used)) == (587, 574)
    assert {n: x.shape for n, x in ours.items()} == used


def test_parameter_counts_of_the_full_size():
    cfg = config.model_config("1p3b")
    shapes = janusflow.param_shapes(cfg)
    assert count(shapes["llm"]) == 1_652_656_128
    assert count(shapes["und_encoder"]) == 303_688_704
    assert count(shapes["gen_encoder"]) == 21_614_336
    assert count(shapes["gen_decoder"]) == 50_561_296
    small = ("und_aligner", "und_begin", "gen_aligner", "gen_norm", "gen_head")
    assert sum(count(shapes[n]) for n in small) == 5_251_840
    assert count(vae.param_shapes(cfg.vae)) == 83_653_863


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(dtype):
    cfg = config.model_config("test")
    model = {n: x.astype(dtype) for n, x in golden.arrays("janusflow/model").items()}
    autoencoder = {
        n: x.astype(dtype) for n, x in golden.arrays("vae/diffusion_pytorch_model").items()
    }
    params = torch_trees.janusflow_from_torch(model, cfg)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}
    vae_params = torch_trees.vae_from_torch(autoencoder, cfg.vae)
    used = {n: x for n, x in model.items() if not torch_trees.is_pool(n)}
    for back, want in (
        (torch_trees.janusflow_to_torch(params, cfg), used),
        (torch_trees.vae_to_torch(vae_params, cfg.vae), autoencoder),
    ):
        assert {n: x.shape for n, x in back.items()} == {n: x.shape for n, x in want.items()}
        assert {n: x.tobytes() for n, x in back.items()} == {
            n: x.tobytes() for n, x in want.items()
        }


def test_old_names_of_the_vaes_attention(vae_folder):
    weights = vae_folder / "diffusion_pytorch_model.safetensors"
    current = load_file(weights)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        return name

    renamed = {rename(n): x for n, x in current.items()}
    assert len(renamed.keys() - current.keys()) == 16
    save_file(renamed, weights)
    opened = source.open_vae(vae_folder)
    assert opened.tensors.keys() == current.keys()
    for name, x in current.items():
        np.testing.assert_array_equal(opened.tensors[name], x)


def test_one_error_lists_all_problems():
    published = dict(golden.arrays("janusflow/model"))
    del published["vision_gen_dec_aligner.bias"]
    published["stranger"] = np.zeros(3)
    published["language_model.model.norm.weight"] = np.zeros(5)
    with pytest.raises(ConvertError) as error:
        torch_trees.janusflow_from_torch(published, config.model_config("test"))
    for part in ("3 problems", "vision_gen_dec_aligner.bias", "stranger", "model.norm.weight"):
        assert part in str(error.value)


def test_layers_of_different_dtypes_are_refused():
    published = dict(golden.arrays("janusflow/model"))
    name = "language_model.model.layers.1.input_layernorm.weight"
    published[name] = published[name].astype(np.float16)
    with pytest.raises(
        ConvertError, match="expected float32, as in the layers before; got float16"
    ):
        torch_trees.janusflow_from_torch(published, config.model_config("test"))


def test_config_of_the_tiny_folder():
    got = hub_configs.model_config_from_hf(*hub_files())
    want = config.model_config("test")
    got.name, got.repa = want.name, want.repa
    assert got == want


def test_config_of_the_released_size():
    files = hub_files()
    files[0]["language_config"] = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 102400,
    }
    files[0]["vision_und_enc_config"]["params"] = {
        "image_size": 384,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    }
    for name in ("vision_gen_enc_config", "vision_gen_dec_config"):
        files[0][name]["params"] |= {"block_out_channels": [768], "hidden_size": 2048}
    files[0]["vision_gen_dec_config"]["params"]["in_channels"] = 768
    files[1]["image_size"] = 384
    files[2] |= {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
    got = hub_configs.model_config_from_hf(*files)
    got.name = "1p3b"
    assert got == config.model_config("1p3b")


@pytest.mark.parametrize(("size", "image_size"), [("1p3b", 384), ("1p3b", 256), ("small", 0)])
def test_towers_have_a_name_that_the_published_code_knows(size, image_size):
    cfg = config.model_config(size, image_size)
    files = hub_configs.model_config_to_hf(cfg, {})
    params = files["config.json"]["vision_und_enc_config"]["params"]
    known = f"siglip_large_patch16_{image_size}"
    assert params["model_name"] == (known if size == "1p3b" else "siglip")
    assert hub_configs.model_config_from_hf(*files.values()) == cfg


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda main, _: main["language_config"].update(hidden_act="gelu"), "hidden_act"),
        (lambda main, _: main["language_config"].update(tie_word_embeddings=True), "tie_word"),
        (
            lambda main, _: main["vision_gen_enc_config"]["params"].pop("kernel_size"),
            "kernel_size: expected 2; got 7",
        ),
        (lambda _, vae: vae.update(shift_factor="a"), "shift_factor: expected a number; got 'a'"),
        (lambda _, vae: vae.update(_class_name="VQModel"), "expected AutoencoderKL .*got 'VQM"),
        (lambda _, vae: vae.update(use_quant_conv=False), "use_post_quant_conv: expected False"),
        (lambda _, vae: vae.update(latents_std=[1.0] * 4), r"latents_std; got \['latents_std'\]"),
        (
            lambda _, vae: vae.update(latents_mean=[0.0] * 4, latents_std=[1.0, True, 1.0, 1.0]),
            "latents_std: expected 4 numbers",
        ),
        (lambda _, vae: vae.update(_class_name="AutoencoderKLFlux2"), "needs the tensors .'bn.run"),
        (lambda main, _: main["language_config"].update(num_key_value_heads=3), "multiple"),
    ],
)
def test_values_that_are_not_implemented(spoil, message):
    main, preprocessor, autoencoder = hub_files()
    main["language_config"]["novelty"] = 1  # changes nothing
    assert hub_configs.model_config_from_hf(main, preprocessor, autoencoder)
    spoil(main, autoencoder)
    with pytest.raises(ConvertError, match=message):
        hub_configs.model_config_from_hf(main, preprocessor, autoencoder)


def test_select_layer_keeps_fewer_blocks():
    files = hub_files()
    files[0]["vision_und_enc_config"]["params"]["select_layer"] = -2
    assert hub_configs.model_config_from_hf(*files).und.num_layers == 1
