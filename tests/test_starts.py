"""The weights in starts/: their size, license and accuracy."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from janusflow_jax import pipeline
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.data import chat_format, images
from janusflow_jax.openmoji import (
    classes,
    drawings as drawings_lib,
    judge,
    prompts,
    scores,
)

STARTS = Path(__file__).parents[1] / "starts"
PARTS = {
    "emoji_vae": {"vae"},
    "emoji_llm": {"llm", "und_aligner", "und_begin", "und_encoder"},
}


def test_the_judge_recognizes_drawings(drawings):
    folder = STARTS / "emoji_judge"
    loaded = judge.load(folder)
    notice = (folder / "README.md").read_text()
    assert "CC BY-SA 4.0" in notice and loaded.about["made_by"] in notice
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 2.5e6
    assert set(loaded.cfg.classes) == set(classes.CLASSES.values())
    every = loaded.cfg.labels
    labels = [scores.Label(name, color) for color, name, _ in drawings]
    cosines = loaded.embed_images([x for _, _, x in drawings]) @ loaded.embed_texts(every).T
    right = np.mean([every[i] == x for i, x in zip(cosines.argmax(1), labels, strict=True)])
    assert right > 0.8  # of 1,864, in an untrained view
    for name in ("heldout_views", "heldout_pairs, a view of its own"):
        assert loaded.about["accuracy"][name]["pair"] > 0.8


@pytest.fixture(scope="module")
def drawings() -> list[tuple[str, str, np.ndarray]]:
    """(color, name, uint8[64, 64, 3]) in a view that no split has."""
    out = []
    for i, (point, name) in enumerate(list(classes.CLASSES.items())[::16]):
        color = list(prompts.PALETTE)[i % 8]
        svg = drawings_lib.load_class(point, name).recolored(color)
        png = drawings_lib.render(svg, drawings_lib.View(3.3, 0.93, -0.7, 0.4), 64)
        out.append((color, name, images.decode(png)))
    return out


def test_size_parts_and_license():
    files = [p for p in STARTS.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) <= 5e6
    assert sum(p.stat().st_size for p in files) <= 8e6
    assert {p.name for p in STARTS.iterdir()} == {*PARTS, "emoji_judge"}
    for name, parts in PARTS.items():
        loaded = model_folder.load_model(STARTS / name)
        assert set(loaded.meta["parts"]) == parts
        notice = (STARTS / name / "README.md").read_text()
        assert "CC BY-SA 4.0" in notice and "openmoji.org" in notice
        assert f"--out starts/{name}" in notice
        for tree in (loaded.params, loaded.vae):
            assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(tree))


def test_the_vae_reconstructs_a_drawing(drawings):
    loaded = model_folder.load_model(STARTS / "emoji_vae")
    model = pipeline.Pipeline(loaded.cfg, {}, loaded.vae, None)
    x = np.stack([image for _, _, image in drawings])
    latents = model.encode_image(list(x))
    again = model.decode_latents(latents, "numpy")
    error = np.mean((x / 255.0 - again / 255.0) ** 2, axis=(1, 2, 3))
    assert (-10 * np.log10(error)).mean() > 26
    # The latents have the scale of the noise.
    np.testing.assert_allclose(np.std(latents), 1, atol=0.15)


def test_the_language_model_names_color_and_class(drawings):
    loaded = model_folder.load_model(STARTS / "emoji_llm")
    chat = chat_format.ChatFormat.load(loaded.hub, loaded.cfg.num_image_tokens)
    model = pipeline.Pipeline(loaded.cfg, loaded.params, {}, chat)
    files = []
    for _, _, image in drawings:
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        files.append([data.getvalue()])
    answers = model.chat(["Describe the picture."] * len(files), images=files, max_new_tokens=16)
    right = [
        answer in drawings_lib.captions(color, name)
        for answer, (color, name, _) in zip(answers, drawings, strict=True)
    ]
    assert np.mean(right) > 0.5, answers
