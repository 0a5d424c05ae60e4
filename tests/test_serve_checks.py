"""JSON and forms to requests: bounds of every field, and all problems at once."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from helpers import fake_engine
from PIL import Image

from janusflow_jax.config import SamplerConfig, StudentConfig
from janusflow_jax.serve import checks
from janusflow_jax.serve.limits import Limits, RequestError

LIMITS = Limits(prompt_chars=20)


def generation(**fields):
    return checks.generation({"prompt": "a fox"} | fields, fake_engine.MODEL, LIMITS, "me")


def chat(**fields):
    messages = [{"role": "user", "content": "hello"}]
    return checks.chat({"messages": messages} | fields, fake_engine.MODEL, LIMITS, "me")


def file(mode="RGB", size=(40, 30), format="PNG", color=0):
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, format)
    return out.getvalue()


def edit(form=None, images=None, masks=()):
    form = {"prompt": "a fox"} | (form or {})
    images = [file()] if images is None else images
    return checks.edit(form, images, masks, fake_engine.MODEL, LIMITS, "me")


def test_a_request_for_images_has_the_defaults_of_the_commands():
    call = generation()
    request = call.request
    assert (request.prompt, request.client, len(request.seeds)) == ("a fox", "me", 1)
    assert (request.sampler.steps, request.guidance_scale) == (30, 2.0)
    assert (call.format, call.side, call.stream, call.ignored) == ("png", 32, False, ())
    assert request.deadline is not None
    assert generation().request.seeds != request.seeds  # drawn anew


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"seed": 7, "n": 3}, (7, 8, 9)),
        ({"seed": 2**32 - 1}, (2**32 - 1,)),
        ({"seed": None, "n": None, "size": None}, None),
    ],
)
def test_seeds_and_nulls(fields, value):
    seeds = generation(**fields).request.seeds
    assert seeds == value if value else len(seeds) == 1


@pytest.mark.parametrize("name", ["num_inference_steps", "steps", "step"])
def test_names_of_other_servers_for_steps_and_guidance(name):
    assert generation(**{name: 5}).request.sampler.steps == 5
    assert generation(cfg_weight=3).request.guidance_scale == 3
    assert generation(guidance=1.5).request.guidance_scale == 1.5


def test_a_student_has_its_own_defaults_and_limits():
    engine = dataclasses.replace(fake_engine.FULL_LIMITS, student=StudentConfig(steps=2))
    model = dataclasses.replace(fake_engine.MODEL, engine=engine)
    request = checks.generation({"prompt": "a fox"}, model, LIMITS, "me").request
    assert (request.sampler.steps, request.guidance_scale) == (2, 1.0)
    for name, value in {"guidance_scale": 3, "order": 2}.items():
        with pytest.raises(RequestError, match=f"{name}: expected 1, because") as caught:
            checks.generation({"prompt": "a fox", name: value}, model, LIMITS, "me")
        assert (caught.value.param, caught.value.code) == (name, "invalid_value")


def test_the_solver_is_chosen_as_in_the_commands():
    sampler = generation(steps=8, order=2, shift=3, guidance_interval=[0, 0.6]).request.sampler
    assert sampler == SamplerConfig(steps=8, order=2, shift=3.0, guide_until=0.6)


@pytest.mark.parametrize(
    ("size", "side"), [("auto", 32), ("32x32", 32), ("512x512", 512), ("1024x1024", 1024)]
)
def test_sizes(size, side):
    assert generation(size=size).side == side


BAD_OF_IMAGES = {
    "prompt": ["", "  ", "x" * 21, 5, ["a"], "\ud800"],
    "n": [0, 11, -1, 1.0, "2", True, 1e999],
    "seed": [-1, 2**32, 0.5, "1", True, 10**400],
    "num_inference_steps": [0, 101, 2.5, "30", True],
    "guidance_scale": [0.9, 20.1, float("nan"), "2", True],
    "order": [0, 3, 1.5],
    "shift": [0, 101, "1"],
    "guidance_interval": [[0], [0.5, 0.4], [0, 2], "0,1", [False, True]],
    "size": ["1536x1024", "63x63", "2048x2048", "x", 512, "0032x0032"],
    "response_format": ["url", 1],
    "output_format": ["gif", ["png"]],
    "output_compression": [-1, 101],
    "background": ["transparent"],
    "quality": ["hd"],
    "style": ["natural"],
    "negative_prompt": ["ugly", 1],
    "stream": [1, "true"],
    "partial_images": [-1, 9, 1],  # 1: without stream
    "model": [5],
}


@pytest.mark.parametrize(("name", "values"), BAD_OF_IMAGES.items())
def test_a_bad_field_of_a_request_for_images_is_named(name, values):
    for value in values:
        with pytest.raises(RequestError) as caught:
            generation(**{name: value})
        error = caught.value
        assert (error.status, error.param) == (400, name), value
        assert name in error.message


BAD_OF_CHAT = {
    "messages": [None, [], "hi", [{"role": "tool", "content": "x"}], [{"role": "user"}]],
    "max_completion_tokens": [0, -1, 1.5, True],
    "max_tokens": [0, "5"],
    "temperature": [-0.1, 2.1, "1"],
    "top_p": [0, 1.1, -1],
    "seed": [-1, 2**32],
    "stop": [["a"] * 5, [""], 5, ["\ud800"], "a" * 501, ["a", "a" * 501]],
    "stream_options": [[], {"include_usage": 1}],
    "n": [2, True, "1"],
    "tools": [[{"type": "function"}]],
    "logprobs": [True],
    "frequency_penalty": [0.5],
    "modalities": [["text", "image"]],
    "response_format": [{"type": "json_object"}],
}


@pytest.mark.parametrize(("name", "values"), BAD_OF_CHAT.items())
def test_a_bad_field_of_a_chat_is_named(name, values):
    for value in values:
        with pytest.raises(RequestError) as caught:
            chat(**{name: value})
        assert (caught.value.status, caught.value.param) == (400, name), value


def test_what_clients_send_by_default_is_harmless():
    call = chat(
        n=1,
        tools=[],
        logprobs=False,
        frequency_penalty=0,
        modalities=["text"],
        response_format={"type": "text"},
        max_tokens=16384,
        stop="x",
        user="u",
        store=False,
    )
    assert call.request.max_tokens == 16384
    assert call.request.stop == ("x",)
    assert call.ignored == ("store", "user")
    assert generation(quality="standard", style="vivid", negative_prompt="").ignored == ()


def test_every_problem_is_in_one_message():
    with pytest.raises(RequestError) as caught:
        generation(n=0, seed=-1, size="x", prompt="")
    for name in ("n: ", "seed: ", "size: ", "prompt: "):
        assert name in caught.value.message
    error = caught.value.body()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_another_model_is_not_found():
    with pytest.raises(RequestError) as caught:
        generation(model="gpt-image-1")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_model_without_parts_is_named():
    limits = dataclasses.replace(fake_engine.FULL_LIMITS, generates=False, chats=False)
    model = dataclasses.replace(fake_engine.MODEL, engine=limits)
    for check, body in ((checks.generation, {"prompt": "x"}), (checks.chat, {"messages": []})):
        with pytest.raises(RequestError, match="lacks parts"):
            check(body, model, LIMITS, "me")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[1]", "a JSON object; got list"),
        (b"1", "a JSON object; got int"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"seed": NaN}', "NaN is no JSON"),
        (b"[" + b"1," * 200_000 + b"1]", "elements"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "expected JSON"),
    ],
)
def test_a_body_that_is_no_object(body, words):
    with pytest.raises(RequestError, match=words):
        checks.json_object(body)


def test_a_repeated_key_among_many_is_found_without_comparing_all():
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    names = [Name(f"k{i}") for i in [*range(1000), 7]]
    with pytest.raises(ValueError, match="'k7' occurs twice"):
        checks._object([(name, 0) for name in names])
    assert len(compared) < 10 * len(names)  # each with all: a million


def test_extra_body_is_merged():
    assert checks.json_object(b'{"a": 1, "extra_body": {"b": 2}}') == {"a": 1, "b": 2}


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def message(*urls, text="look"):
    images = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def test_images_of_a_conversation_come_in_the_models_size():
    big = data_url(file(size=(300, 200), format="JPEG"), "jpeg")
    request = chat(messages=message(big, data_url(file()))).request
    assert [x.shape for x in request.images] == [(32, 32, 3)] * 2
    assert len(request.messages[0]["content"]) == 3


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized():
    most = 16 * fake_engine.FULL_LIMITS.context
    half = {"role": "user", "content": "x" * (most // 2 - len("user"))}
    assert len(chat(messages=[half, half]).request.messages) == 2
    with pytest.raises(RequestError, match=f"at most {most} characters.*got {most + 5}") as caught:
        chat(messages=[half, half, {"role": "user", "content": "x"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert caught.value.code == "context_length_exceeded"


def test_tags_in_a_text_are_text():
    text = "<image_placeholder> <｜end▁of▁sentence｜>"
    request = chat(messages=message(text=text)).request
    assert request.messages[0]["content"] == [text] and not request.images


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://169.254.169.254/latest", "image_url_not_allowed"),
        ("file:///etc/passwd", "image_url_not_allowed"),
        ("/etc/passwd", "image_url_not_allowed"),
        ("data:text/html;base64,AAAA", "image_url_not_allowed"),
        ("data:image/png;base64,!!!!", "invalid_image"),
        ("data:image/png;base64,AAAA", "invalid_image"),
        ("data:image/png,AAAA", "invalid_image"),
    ],
)
def test_images_that_are_not_read(url, code):
    with pytest.raises(RequestError) as caught:
        chat(messages=message(url))
    assert (caught.value.status, caught.value.code) == (400, code)


def test_a_bomb_of_pixels_is_refused_before_it_is_decoded():
    bomb = file("1", (8_000, 8_000))
    assert len(bomb) < 20_000
    with pytest.raises(RequestError, match="megapixels"):
        chat(messages=message(data_url(bomb)))
    with pytest.raises(RequestError, match="megapixels"):
        edit(images=[bomb])


def test_too_many_images():
    with pytest.raises(RequestError) as caught:
        chat(messages=message(*[data_url(file(size=(1, 1)))] * 9))
    assert caught.value.code == "too_many_images"


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_other_color_modes(mode):
    assert len(chat(messages=message(data_url(file(mode, format="JPEG"), "jpeg"))).request.images)


def test_the_first_frame_of_an_animation_is_the_image():
    frames = [Image.new("RGB", (8, 8), (x, 0, 0)) for x in (250, 20)]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    (image,) = chat(messages=message(data_url(out.getvalue(), "webp"))).request.images
    assert (image[..., 0] > 200).all()


def test_edits_come_from_text_fields():
    call = edit({"n": "2", "seed": "5", "guidance_scale": "1.5", "stream": "true", "x": "1"})
    request = call.request
    assert request.seeds == (5, 6) and request.guidance_scale == 1.5 and call.stream
    assert request.image.shape == (32, 32, 3) and request.mask is None
    assert (request.strength, call.ignored) == (0.6, ("x",))


@pytest.mark.parametrize(
    "form",
    [
        {"guidance_interval": "[0, 0.6]"},
        {"guidance_interval[]": ["0", "0.6"]},  # as OpenAI's client writes a list
    ],
)
def test_a_form_may_have_a_list(form):
    call = edit(form)
    assert (call.request.sampler.guide_from, call.request.sampler.guide_until) == (0.0, 0.6)
    assert not call.ignored


def test_a_mask_says_what_is_generated_again():
    mask = Image.new("L", (40, 30), 0)
    mask.paste(255, (0, 0, 20, 30))  # the left half; the square begins at x = 5
    out = io.BytesIO()
    mask.save(out, "PNG")
    request = edit(masks=[out.getvalue()]).request
    assert request.strength == 1.0
    left = np.flatnonzero(request.mask.all(0))
    assert left.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda: edit(images=[]), "image"),
        (lambda: edit(images=[file(), file()]), "image"),
        (lambda: edit(images=[b"x"]), "image"),
        (lambda: edit(masks=[file("L"), file("L")]), "mask"),
        (lambda: edit(masks=[file("L", (5, 5), color=255)]), "mask"),
        (lambda: edit({"strength": "1.1"}), "strength"),
        (lambda: edit({"strength": "nan"}), "strength"),
        (lambda: edit({"n": "1e999"}), "n"),
        (lambda: edit({"n": ""}), "n"),
        (lambda: edit({"guidance_interval": "0, 1"}), "guidance_interval"),
        (lambda: edit({"guidance_interval": "[" * 60_000}), "guidance_interval"),
        (lambda: edit({"guidance_interval[]": ["0.6"]}), "guidance_interval[]"),
        (lambda: edit({"guidance_interval[]": ["0", "x"]}), "guidance_interval[]"),
    ],
)
def test_bad_edits(call, param):
    with pytest.raises(RequestError) as caught:
        call()
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_message_of_any_client_text_is_ascii():
    with pytest.raises(RequestError) as caught:
        generation(n="\ud800", prompt="x", **{"\ud801": 1})
    json.dumps(caught.value.body()).encode("ascii")
