"""Files of generated images say how they were made."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from janusflow_jax.config import SamplerConfig
from janusflow_jax.data import image_files, images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
SETTINGS = image_files.settings(
    prompt="a ré\nfox",
    seed=7,
    sampler=SamplerConfig(steps=5, order=2),
    guidance_scale=3.0,
    model="tiny",
    model_sha256="ab",
)


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_a_png_holds_its_settings_and_its_pixels():
    data = image_files.encode(PIXELS, SETTINGS)
    image = opened(data)
    assert json.loads(image.text[image_files.TEXT_KEY]) == SETTINGS
    assert image.text["parameters"].startswith("a ré\nfox\nSteps: 5, CFG scale: 3.0, Seed: 7")
    np.testing.assert_array_equal(images.decode(data), PIXELS)


def test_settings_that_are_defaults_are_left_out():
    assert SETTINGS["order"] == 2
    assert not {"shift", "guidance_interval"} & {*SETTINGS}


@pytest.mark.parametrize("format", list(image_files.FORMATS))
@pytest.mark.parametrize("settings", [SETTINGS, {}])
def test_every_file_is_marked(format, settings):
    image = opened(image_files.encode(PIXELS, settings, format))
    assert image.format == format.upper()
    assert image_files.SOURCE_TYPE.encode() in image.info["xmp"]
    if format == "jpeg":
        assert json.loads(image.info.get("comment", b"{}") or b"{}") == settings


def test_quality_changes_the_size_of_a_jpeg():
    low, high = (len(image_files.encode(PIXELS, {}, "jpeg", q)) for q in (10, 95))
    assert low < high
