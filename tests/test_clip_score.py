"""CLIP: its towers agree with transformers', its score is 100 x cosine."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from etils import epath

from janusflow_jax.config.errors import ConvertError
from janusflow_jax.eval import clip
from janusflow_jax.hub import tensors
from janusflow_jax.hub.safetensors import LazyTensor, write_folder

LETTERS = "abcdefghijklmnopqrstuvwxyz,.'!0123456789"
VOCAB = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "ca", "cat</w>", "re", "red</w>"]
MERGES = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
TEXTS = ["a red cat", "It's A big dog, 12 cats and a very long text that is cut", "x"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 20


def config() -> dict:
    size = {"num_hidden_layers": 2, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    image = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6}
    ids = {"bos_token_id": len(VOCAB), "eos_token_id": len(VOCAB) + 1}
    return {
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": size
        | text
        | {"vocab_size": len(VOCAB) + 2, "max_position_embeddings": LENGTH}
        | ids,
        "vision_config": size | image | {"image_size": 32, "patch_size": 8},
    }


def save_tokenizer(folder):
    vocab = {token: i for i, token in enumerate([*VOCAB, BOS, EOS])}
    model = tokenizers.models.BPE(vocab, MERGES, unk_token=EOS, end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        (EOS, vocab[EOS]), (BOS, vocab[BOS]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP of random numbers, as published."""
    out = epath.Path(tmp_path_factory.mktemp("clip"))
    (out / "config.json").write_text(json.dumps(config()))
    shapes = tensors.to_torch(clip.param_shapes(clip.config_from_hf(config())), clip.rules())
    draw = np.random.default_rng(0)
    values = {name: draw.normal(0, 0.2, x.shape).astype(np.float32) for name, x in shapes.items()}
    values["logit_scale"] = np.ones((), np.float32)
    lazy = {n: LazyTensor(x.shape, x.dtype, lambda x=x: x) for n, x in values.items()}
    write_folder(out, "model", lazy)
    save_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return clip.load(folder)


def images():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_score_is_100_cosines_and_never_negative(model):
    features = model.embed_images(images()) * np.float32([[-1], [1], [1]])
    cosines = (unit(features) * unit(model.embed_texts(TEXTS))).sum(1)
    assert cosines.min() < 0 < cosines.max()  # or the next line could not fail
    want = {"clip_score": np.maximum(100 * cosines, 0).mean(), "of": 3, "truncated_prompts": 1}
    assert clip.score(model, features, TEXTS) == pytest.approx(want, rel=1e-5)
    assert clip.score(model, 3 * features, TEXTS) == pytest.approx(want, rel=1e-5)
    other = clip.score(model, features, TEXTS[::-1])["clip_score"]
    assert other != pytest.approx(want["clip_score"], rel=1e-3)


def test_a_text_is_cut_at_the_length_of_the_model_and_nothing_else_changes_it(model):
    (encoding,) = model.tokenizer.encode_batch(TEXTS[1:2])
    assert len(encoding.ids) == LENGTH and encoding.tokens[-1] == EOS
    first, second = model.embed_texts(["a red cat x", "a red cat z"])
    assert np.abs(first - second).max() > 1e-3
    ids = model.tokenizer.encode(TEXTS[2]).ids
    unpadded = model._apply("embed_texts", np.int32([ids]), np.int32([len(ids)]))[0]
    np.testing.assert_allclose(model.embed_texts(TEXTS)[2], unpadded, atol=1e-5)


def test_images_are_resized_by_their_short_side_and_cropped():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    assert (clip.preprocess(image, 40) == 255).all()
    got = clip.preprocess(image, 20)
    assert got.shape == (20, 20, 3) and (got[:, 2:18] == 255).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "siglip"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"projection_dim": 25}, "shape"),
    ],
)
def test_what_is_no_clip_is_refused(folder, tmp_path, changes, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config() | changes))
    with pytest.raises(ConvertError, match=message):
        clip.load(tmp_path)


@pytest.mark.slow
def test_both_towers_agree_with_transformers(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra `dev`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `dev`")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vocab = {token: i for i, token in enumerate([*VOCAB, BOS, EOS])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=MERGES)
    tokenizer.save_pretrained(tmp_path)  # over ours, as published
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = processor(images=list(images()), return_tensors="pt")["pixel_values"]
    reference = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = reference(**inputs, pixel_values=pixels)
    model = clip.load(tmp_path)
    got = unit(model.embed_images(images())), unit(model.embed_texts(TEXTS))
    np.testing.assert_allclose(got[0], want.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(got[1], want.text_embeds.numpy(), atol=1e-5)
