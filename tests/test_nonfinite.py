"""What is not finite is an error that names the rows, never a black image or an answer."""

import copy
import json

import numpy as np
import pytest
from etils import epath

from janusflow_jax import generate, pipeline
from janusflow_jax.config import TrainConfig
from janusflow_jax.config.errors import DivergedError
from janusflow_jax.eval import previews
from janusflow_jax.training import metrics

PROMPTS = ["a red fox", "a tree", "a blue whale"]
NAN, INF = float("nan"), float("inf")


def changed(model, part, value, index):
    """The model with `value` at an index of one of its arrays, `vae` or `params/...`."""
    out = copy.copy(model)
    out.params, out.vae = copy.deepcopy((model.params, model.vae))
    *path, last = part.split("/")
    tree = {"params": out.params, "vae": out.vae}
    for name in path:
        tree = tree[name]
    tree[last] = tree[last].at[index].set(value)
    return out


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("params/llm/head/kernel", NAN),
        ("params/llm/norm/scale", INF),
        ("params/und_aligner/kernel", NAN),
    ],
)
def test_an_answer(part, value, golden_model):
    image = np.zeros((8, 8, 3), np.uint8)
    model = changed(golden_model, part, value, (0,))
    with pytest.raises(DivergedError, match="1 of 1 conversations"):
        model.chat("Who?", [image], max_new_tokens=4)
    with pytest.raises(DivergedError):
        list(model.stream("Who?", [image], max_new_tokens=4))


@pytest.mark.parametrize(
    ("part", "value", "output"),
    [
        ("params/gen_aligner/kernel", INF, "pil"),
        ("params/gen_aligner/kernel", NAN, "latent"),
        ("params/gen_decoder/out_conv/kernel", NAN, "trajectory"),
        ("vae/decoder/conv_out/kernel", NAN, "numpy"),
        ("vae/decoder/conv_out/bias", INF, "pil"),
    ],
)
def test_an_image(part, value, output, golden_model):
    model = changed(golden_model, part, value, (0,))
    with pytest.raises(DivergedError, match=r"\[0, 1, 2\] of 3") as error:
        model.generate(PROMPTS, num_steps=2, output=output)
    assert error.value.images == [None] * 3


def one_bad_word(model):
    """The model with an embedding of the second prompt that is not finite."""
    ids = [model.text.generation_ids(p) for p in PROMPTS]
    return changed(
        model, "params/llm/embedding", NAN, next(i for i in ids[1] if i not in ids[0] + ids[2])
    )


def test_the_other_images_are_as_they_were(golden_model):
    options = {"num_steps": 2, "output": "latent"}
    want = golden_model.generate(PROMPTS, **options)
    with pytest.raises(DivergedError, match=r"\[1\] of 3") as error:
        one_bad_word(golden_model).generate(PROMPTS, **options)
    first, second, third = error.value.images
    assert second is None
    np.testing.assert_array_equal([first, third], want[[0, 2]])


def test_generate_writes_the_others_and_fails(golden_model, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "load", lambda path, **_: one_bad_word(golden_model))
    args = [f"--prompt={p}" for p in PROMPTS] + ["--model=m", "--steps=2"]
    report = tmp_path / "report.json"
    for out in (tmp_path / "images", tmp_path / "sheet.png"):
        with pytest.raises(DivergedError, match="a tree"):
            generate.main([*args, "--out", str(out), "--json", str(report)])
    assert sorted(x.name for x in (tmp_path / "images").iterdir()) == ["0000.png", "0002.png"]
    assert not (tmp_path / "sheet.png").exists()
    assert [x["file"] for x in json.loads(report.read_text())["images"]] == [None] * 3
    with pytest.raises(DivergedError):
        generate.main([*args, "--out", str(tmp_path / "images"), "--json", str(report)])
    files = [x["file"] for x in json.loads(report.read_text())["images"]]
    assert files == [f"{tmp_path}/images/0000.png", None, f"{tmp_path}/images/0002.png"]


def test_previews_do_not_end_a_run(golden_model, monkeypatch, tmp_path, capsys):
    broken = changed(golden_model, "params/gen_aligner/kernel", NAN, (0,))
    monkeypatch.setattr(pipeline, "Pipeline", lambda *args, **kwargs: broken)
    writer = metrics.Writer(epath.Path(tmp_path), resume_step=0, tensorboard=False)
    cfg = TrainConfig(model=golden_model.cfg, prompts=("a red fox",), sheet_num_steps=2)
    state = {"params": {}, "frozen": {}, "ema": {}, "vae": {}}
    args = (cfg, epath.Path(tmp_path), 3, state, golden_model.text, writer)
    previews.write(*args)
    assert "step 3: no sheet" in capsys.readouterr().out
    monkeypatch.setattr(type(broken), "generate", lambda *_, **__: {}["image"])  # any other error
    previews.write(*args)
    assert "step 3: no sheet: KeyError('image')" in capsys.readouterr().out


def test_guidance_noise_and_latents(golden_model):
    noise = np.zeros((2, *golden_model.cfg.latent_shape), np.float32)
    with pytest.raises(DivergedError):
        golden_model.generate(PROMPTS[0], num_steps=2, guidance_scale=1e38)
    noise[1, 0, 0, 0] = NAN
    with pytest.raises(DivergedError, match=r"\[1\] of 2"):
        golden_model.generate(PROMPTS[:2], num_steps=2, noise=noise)
    with pytest.raises(DivergedError, match=r"\[1\] of 2"):
        golden_model.decode_latents(noise)
    broken = changed(golden_model, "vae/encoder/conv_in/kernel", NAN, (0,))
    with pytest.raises(DivergedError, match="encode_image"):
        broken.encode_image(np.zeros((8, 8, 3), np.uint8))
