"""The engine on the golden model: the same bits whatever runs beside a request."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import golden
from helpers.compilations import Compilations

from janusflow_jax.config import SamplerConfig
from janusflow_jax.data import images as images_lib
from janusflow_jax.parallel import numerics
from janusflow_jax.serve import engine as engine_lib
from janusflow_jax.serve.requests import (
    ChatRequest,
    EngineSettings,
    Failed,
    Finished,
    ImageDone,
    ImageRequest,
    Preview,
    Text,
)

SIZES = {"rows": 4, "lanes": 2, "context": 192, "prompt_tokens": 32}


@pytest.fixture(scope="module")
def engine(golden_model):
    """One shape for everything; tests take its turns."""
    out = engine_lib.Engine(golden_model, EngineSettings(invariant=True, **SIZES))
    with numerics.fixed():
        out.warm_up()
    return out


def serve(engine, requests, arrivals=None):
    """The events of each request; the k-th is submitted before turn `arrivals[k]`."""
    events = [[] for _ in requests]
    left = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    turn = 0
    with numerics.fixed():
        while engine.turn() or left:
            while left and left[0][0] <= turn:
                k = left.pop(0)[1]
                engine.submit(requests[k], events[k].append)
            turn += 1
            assert turn < 500
    status = engine.status()
    assert status.rows_used == status.lanes_used == 0
    return events


def image(name, prompt, seeds, scale=2.0, previews=0, edit=None, **sampler):
    return ImageRequest(
        id=name,
        client=name,
        prompt=prompt,
        seeds=seeds,
        guidance_scale=scale,
        sampler=SamplerConfig(**sampler),
        previews=previews,
        **edit or {},
    )


def photo():
    return images_lib.for_generation(images_lib.read(golden.TINY / "images" / "0.png"), 64)


def half():
    mask = np.zeros((64, 64), bool)
    mask[:, 40:] = True
    return mask


IMAGES = [
    image("plain", "a red fox", (7, 8), previews=2, steps=5),
    image("alone", "a tree", (9,), scale=1.0, previews=1, steps=3),
    image(
        "solver",
        "Two yellow taxis in the snow beside a quiet river",
        (10,),
        scale=5.0,
        steps=4,
        order=2,
        shift=2.0,
        guide_from=0.1,
        guide_until=0.7,
    ),
    image("varied", "a frog", (11,), edit={"image": photo(), "strength": 0.5}, steps=4),
    image("inpainted", "a frog", (12,), edit={"image": photo(), "mask": half()}, steps=3),
]


def cases():
    """The golden conversations: published turns, and the arrays of their images."""
    for case in golden.facts("expected")["chat"]:
        paths = [golden.TINY / "images" / name for name in case["images"]]
        yield case["conversation"], [images_lib.read(path) for path in paths]


def chats(temperature):
    out = []
    for i, (turns, pixels) in enumerate(cases()):
        parts = [t | {"content": t["content"].split("<image_placeholder>")} for t in turns]
        options = {"max_tokens": 24, "temperature": temperature, "top_p": 0.9, "seed": 5}
        name = f"chat {i} {temperature}"
        out.append(
            ChatRequest(id=name, client="c", messages=parts, images=tuple(pixels), **options)
        )
    return out


def results(events):
    """What a request got, in an order of its own."""
    assert isinstance(events[-1], Finished), events[-1]
    images = [e for e in events if isinstance(e, (Preview, ImageDone))]
    images.sort(key=lambda e: (e.index, getattr(e, "step", 1000)))
    return [e.image for e in images], "".join(e.piece for e in events if isinstance(e, Text))


def test_load_changes_no_bit_and_compiles_nothing(engine):
    requests = [*IMAGES, *chats(0.0), *chats(1.0)]
    with Compilations() as compiled:
        mixed = serve(engine, requests, [3, 1, 0, 4, 2, 1, 3, 2, 5])
    assert not compiled.names
    for request, events in zip(requests, mixed, strict=True):
        (alone,) = serve(engine, [request])
        (images, text), (want, answer) = results(events), results(alone)
        assert text == answer
        assert len(images) == len(want) == sum(isinstance(e, Preview | ImageDone) for e in alone)
        for got, expected in zip(images, want, strict=True):
            np.testing.assert_array_equal(got, expected)
    plain = [e for e in mixed[0] if isinstance(e, Preview)]
    assert sorted((e.index, e.step) for e in plain) == [(0, 2), (0, 3), (1, 2), (1, 3)]


def level(got, want):
    """The largest difference of pixels."""
    return np.abs(np.asarray(got, int) - np.asarray(want, int)).max()


def test_images_are_those_of_generate(engine, golden_model):
    cfg = IMAGES[2].sampler
    euler = dataclasses.replace(IMAGES[2], id="euler", sampler=dataclasses.replace(cfg, order=1))
    (events, other) = serve(engine, [IMAGES[2], euler])
    options = {"order": 2, "shift": 2.0, "guidance_interval": (0.1, 0.7), "num_steps": 4}
    options |= {"guidance_scale": 5.0, "seed": 10, "output": "numpy"}
    want = golden_model.generate(IMAGES[2].prompt, **options)
    assert level(results(events)[0], want) <= 1 < level(results(other)[0], want)


@pytest.mark.slow
def test_images_are_those_of_generate_vary_and_inpaint(engine, golden_model):
    plain, alone, _, varied, inpainted = (results(e)[0] for e in serve(engine, IMAGES))
    options = {"output": "numpy", "num_steps": 5}
    want = golden_model.generate("a red fox", images_per_prompt=2, seed=7, **options)
    assert level(plain[2::3], want) <= 1
    options["num_steps"] = 3
    want = golden_model.generate("a tree", seed=9, guidance_scale=1.0, **options)
    assert level(alone[-1:], want) <= 1
    want = golden_model.inpaint(photo(), half(), "a frog", seed=12, **options)
    assert level(inpainted, want) <= 1
    np.testing.assert_array_equal(inpainted[0][:, :40], photo()[:, :40])
    options["num_steps"] = 4
    want = golden_model.vary(photo(), "a frog", seed=11, strength=0.5, **options)
    assert level(varied, want) <= 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_chat(engine, golden_model, temperature):
    answers = [results(events)[1] for events in serve(engine, chats(temperature), [0, 1])]
    for answer, (turns, pixels) in zip(answers, cases(), strict=True):
        options = {"temperature": temperature, "top_p": 0.9, "seed": 5}
        assert answer == golden_model.chat(turns, pixels, max_new_tokens=24, **options)


def test_a_non_finite_image_fails_alone(engine):
    bad = image("bad", "a frog", (1, 2), scale=3e38, steps=5)
    beside, failed = serve(engine, [IMAGES[1], bad])
    assert isinstance(failed[-1], Failed) and failed[-1].code == "not_finite"
    assert not [e for e in failed if isinstance(e, ImageDone)]
    (alone,) = serve(engine, [IMAGES[1]])
    for got, want in zip(results(beside)[0], results(alone)[0], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_fewer_rows_are_computed_at_less_load(golden_model, engine):
    """Without `invariant` results differ by the rounding of another shape."""
    other = engine_lib.Engine(golden_model, EngineSettings(**SIZES))
    assert other._programs.row_counts == (2, 4)
    with numerics.fixed():
        other.warm_up()
    for got, want in zip(serve(other, IMAGES), serve(engine, IMAGES), strict=True):
        assert level(results(got)[0], results(want)[0]) <= 1


@pytest.mark.slow
def test_an_engine_computes_on_its_own_device(golden_model, engine):
    second = jax.local_devices()[1]
    settings = EngineSettings(invariant=True, **SIZES)
    other = engine_lib.Engine(golden_model, settings, device=second)
    with numerics.fixed():
        other.warm_up()
    requests = [IMAGES[1], *chats(0.0)]
    for got, want in zip(serve(other, requests), serve(engine, requests), strict=True):
        (images, text), (expected, answer) = results(got), results(want)
        np.testing.assert_array_equal(images, expected)
        assert text == answer
    assert other._programs._images["z"].devices() == {second}
    assert jax.tree.leaves(other._programs._lanes["cache"])[0].devices() == {second}
