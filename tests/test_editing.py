"""`vary`, `inpaint` and `edit` on the golden model: what must not change, and what is refused."""

import json

import numpy as np
import pytest
from helpers import golden
from PIL import Image

from janusflow_jax import cli, edit
from janusflow_jax.data import images

PATHS = [str(golden.TINY / "images" / f"{n}.png") for n in range(2)]
PROMPTS = ["a red fox", "Two yellow taxis in the snow beside a quiet river"]
QUICK = {"num_steps": 4, "output": "latent", "seed": 7}


@pytest.fixture
def model(golden_model):
    return golden_model


def left_half(path):
    """A mask of an image: its left half is generated again."""
    with Image.open(path) as image:
        mask = np.zeros((image.height, image.width), bool)
    mask[:, : mask.shape[1] // 2] = True
    return mask


@pytest.mark.parametrize("options", [{}, {"order": 2, "shift": 2.0, "guidance_scale": 1.0}])
def test_strength_one_is_generation_and_zero_is_the_image(model, options):
    whole = model.vary(PATHS, PROMPTS, strength=1.0, **QUICK, **options)
    np.testing.assert_array_equal(whole, model.generate(PROMPTS, **QUICK, **options))
    none = model.vary(PATHS, PROMPTS, strength=0.0, **QUICK, **options)
    np.testing.assert_array_equal(none, model.encode_image(PATHS))
    half = model.vary(PATHS, PROMPTS, strength=0.5, **QUICK, **options)
    assert np.abs(half - whole).max() > 0.1 and np.abs(half - none).max() > 0.1


def test_inpainting_everything_is_generation(model):
    masks = [np.ones_like(left_half(path)) for path in PATHS]
    got = model.inpaint(PATHS, masks, PROMPTS, **QUICK)
    np.testing.assert_array_equal(got, model.generate(PROMPTS, **QUICK))


def test_inpainting_keeps_what_is_not_marked(model):
    masks = [left_half(path) for path in PATHS]
    latents = model.inpaint(PATHS, masks, PROMPTS, **QUICK)
    before, side = model.encode_image(PATHS), model.cfg.latent_shape[0]
    changed = np.abs(latents - before).max((0, 1, 3)) > 0
    assert changed.tolist() == [x <= side // 2 for x in range(side)]  # a cell more than the half
    options = {**QUICK, "output": "numpy"}
    pixels = model.inpaint(PATHS, masks, PROMPTS, **options)
    size = model.cfg.image_size
    original = images.for_generation(images.read(PATHS[0]), size)
    np.testing.assert_array_equal(pixels[0, :, size // 2 :], original[:, size // 2 :])
    assert (pixels[0, :, : size // 2] != original[:, : size // 2]).mean() > 0.5


def test_equal_prompts_and_scales_edit_nothing(model):
    got = model.edit(PATHS, PROMPTS, sources=PROMPTS, **QUICK)
    np.testing.assert_array_equal(got, model.encode_image(PATHS))


def test_an_edit_is_the_images_alone_with_its_seed(model):
    sources = ["a tree", "a blue whale"]
    together = model.edit(PATHS, PROMPTS, sources=sources, **QUICK)
    for n in range(2):
        options = {**QUICK, "seed": 7 + n}
        alone = model.edit(PATHS[n], PROMPTS[n], sources=sources[n], **options)
        np.testing.assert_allclose(alone[0], together[n], atol=1e-5)
    assert np.abs(together - model.encode_image(PATHS)).max() > 0.1
    assert (model.edit(PATHS, PROMPTS, sources=sources, strength=0.0, **QUICK) != together).any()


def test_the_model_describes_the_source(model):
    caption = model.chat("Describe the picture.", [PATHS[0]])
    assert model.describe(PATHS[:1]) == [caption]
    want = model.edit(PATHS[0], PROMPTS[0], sources=caption, **QUICK)
    np.testing.assert_array_equal(model.edit(PATHS[0], PROMPTS[0], **QUICK), want)


def test_a_cell_is_generated_with_its_neighbors():
    mask = np.zeros((8, 8), bool)
    mask[3, 5] = True
    cells = images.mask_cells(mask, 4)
    assert np.argwhere(cells).tolist() == [[y, x] for y in (0, 1, 2) for x in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "marked"), [("L", 255), ("RGBA", (0, 0, 0, 0)), ("RGB", (255, 255, 255))]
)
def test_white_and_transparent_pixels_are_generated(kind, marked):
    mask = Image.new(kind, (10, 8), {"L": 0, "RGBA": (9, 9, 9, 255), "RGB": (0, 0, 0)}[kind])
    mask.paste(marked, (1, 0, 5, 8))  # the central square of 10 x 8 begins at x = 1
    got = images.read_mask(mask, (8, 10), 8)
    assert got[:, :4].all() and not got[:, 4:].any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.vary(PATHS, "a"), "expected one prompt for each of the images; got 2 im"),
        (lambda m: m.vary(PATHS[0], "a", strength=1.5), "vary: strength: .* 0 to 1; got 1.5"),
        (lambda m: m.vary(PATHS[0], "a", num_steps=0), "num_steps: expected an integer"),
        (lambda m: m.vary(PATHS[0], "a", output="trajectory"), "got 'trajectory'"),
        (lambda m: m.vary(np.zeros((4, 4)), "a"), r"expected uint8\[H, W, 3\]; got float64"),
        (lambda m: m.inpaint(PATHS[0], np.ones((3, 5), bool), "a"), "mask: .*; got 5 x 3"),
        (lambda m: m.inpaint(PATHS[0], left_half(PATHS[0]) & False, "a"), "got none"),
        (lambda m: m.inpaint(PATHS[0], None, "a"), "expected a path, bytes.*got NoneType"),
        (lambda m: m.inpaint(PATHS, left_half(PATHS[0]), ["a"] * 2), "got 1 masks and 2 prompts"),
        (lambda m: m.edit(PATHS[0], "a", sources="b", order=2), "edit: expected order 1"),
        (lambda m: m.edit(PATHS[0], "a", sources=["b", "c"]), "got 2 sources and 1 prompts"),
        (lambda m: m.edit(PATHS[0], "a", sources=" "), "what image 0 shows now; got none"),
    ],
)
def test_what_cannot_be_edited_says_why(model, call, says):
    with pytest.raises(ValueError, match=says):
        call(model)


@pytest.mark.slow
def test_the_command_edits_varies_and_inpaints(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "load", lambda args: model)
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(left_half(PATHS[0])).save(mask)
    args = ["--model", "m", "--image", PATHS[0], "--prompt", "a tree", "--out", str(out)]
    args += ["--steps", "2"]
    options = {"num_steps": 2, "output": "numpy"}
    cases = [
        (["--mask", str(mask)], model.inpaint(PATHS[0], left_half(PATHS[0]), "a tree", **options)),
        (["--vary", "0.5"], model.vary(PATHS[0], "a tree", strength=0.5, **options)),
        (["--source", "b"], model.edit(PATHS[0], "a tree", sources="b", **options)),
        ([], model.edit(PATHS[0], "a tree", **options)),
    ]
    for more, want in cases:
        edit.main([*args, *more])
        np.testing.assert_array_equal(np.asarray(Image.open(out)), want[0])
    settings = json.loads(Image.open(out).text["janusflow_jax"])
    assert settings["method"] == "edit" and settings["source"] == model.describe(PATHS[:1])[0]
    assert repr(model.describe(PATHS[:1])[0]) in capsys.readouterr().err
    for more, says in [
        (["--mask", str(mask), "--vary", "0.5"], "expected --mask or --vary; got both"),
        (["--vary", "0.5", "--source", "b"], "--source: expected without --vary"),
        (["--vary", "0.5", "--strength", "0.5"], "--strength: expected without --vary"),
        (["--mask", str(mask), "--source-guidance-scale", "1"], "--source-guidance-scale: expec"),
    ]:
        with pytest.raises(ValueError, match=says):
            edit.main([*args, *more])
