"""The server with the golden model: OpenAI's client gets the pixels and words of the pipeline."""

import base64
import contextlib
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import httpx
import numpy as np
import openai
import pytest
from helpers import golden
from helpers.fake_engine import listening, wait_for
from PIL import Image

from janusflow_jax.serve import app, command
from janusflow_jax.serve.engine import Engine
from janusflow_jax.serve.limits import Limits
from janusflow_jax.serve.requests import EngineSettings

ROOT = pathlib.Path(__file__).parents[1]
SIZES = ["--rows", "4", "--lanes", "2", "--context", "192", "--prompt-tokens", "32"]
PICTURE = golden.TINY / "images"


@pytest.fixture(scope="module")
def client(golden_folder, golden_model):
    args = command.parse(["--model", str(golden_folder), *SIZES, "--invariant"])
    settings, limits, _ = command.check(args)
    engine = Engine(golden_model, settings)
    server = app.Server(engine, command.serve_model(golden_model, engine, args), limits)
    with listening(server) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def pixels(item):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json)))).astype(int)


def picture():
    return sorted(PICTURE.iterdir())[0].read_bytes()


@pytest.mark.slow
def test_what_the_model_can(client, golden_model):
    (model,) = client.models.list().data
    about = model.model_extra["janusflow"]
    assert model.id == golden_model.cfg.name
    assert about["image_size"] == golden_model.cfg.image_size
    assert about["generates"] and about["understands"] and about["dtype"] == "float32"
    assert len(about["sha256"]) == 64


@pytest.mark.slow
def test_images_are_those_of_the_pipeline(client, golden_model):
    want = golden_model.generate("a red fox", images_per_prompt=2, seed=3, num_steps=4)
    settings = {"seed": 3, "num_inference_steps": 4}
    answer = client.images.generate(prompt="a red fox", n=2, extra_body=settings)
    for item, image in zip(answer.data, want, strict=True):
        assert np.abs(pixels(item) - np.asarray(image)).max() <= 1
    stream = client.images.generate(
        prompt="a red fox", stream=True, partial_images=2, extra_body=settings
    )
    *partial, last = stream
    assert [x.partial_image_index for x in partial] == [0, 1]
    assert np.abs(pixels(last) - np.asarray(want[0])).max() <= 1


@pytest.mark.slow
def test_edits_keep_what_the_mask_keeps(client, golden_model):
    size = golden_model.cfg.image_size
    start = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255
    files = []
    for array in (start, mask):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        files.append(file.getvalue())
    settings = {"seed": 1, "num_inference_steps": 4}
    answer = client.images.edit(image=files[0], mask=files[1], prompt="x", extra_body=settings)
    got = pixels(answer.data[0])
    np.testing.assert_array_equal(got[:, size // 2 :], start[:, size // 2 :])
    assert (got[:, : size // 2] != start[:, : size // 2]).any()
    again = client.images.edit(image=files[0], prompt="x", extra_body=settings | {"strength": 0.5})
    assert again.model_extra["method"] == "flow_image_to_image"


@pytest.mark.slow
def test_answers_are_those_of_the_pipeline(client, golden_model):
    want = golden_model.chat("What is it?", images=[picture()], max_new_tokens=12)
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is it?"},
    ]
    ask = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12}
    ask["model"] = golden_model.cfg.name
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content == want
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = client.chat.completions.create(**ask, **options)
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == want
    assert usage.usage == answer.usage and answer.usage.completion_tokens == 12


@pytest.mark.slow
def test_what_does_not_fit_is_a_bad_request(client, golden_model):
    for call in (
        lambda: client.images.generate(prompt="red fox " * 200),
        lambda: client.chat.completions.create(
            model=golden_model.cfg.name, messages=[{"role": "user", "content": "fox " * 500}]
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "context_length_exceeded"


@contextlib.contextmanager
def command_line(folder, *options):
    """The command in a process of its own: its address and the process."""
    code = [sys.executable, "-m", "janusflow_jax.serve", "--model", str(folder), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*code, *SIZES, *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(child.stderr), daemon=True)
        reader.start()
        try:
            wait_for(lambda: address(lines) or child.poll() is not None, 120)
            yield address(lines), child, lines
        finally:
            child.kill()
            child.wait()
            reader.join(5)


def address(lines):
    match = re.search(r"http://\S+", "".join(lines))
    return match and match[0]


def is_ready(url):
    return httpx.get(f"{url}/ready").status_code == 200


@pytest.mark.slow
def test_the_command_ends_cleanly_and_starts_again_after_a_kill(golden_folder):
    with command_line(golden_folder, "--drain", "200") as (url, child, lines):
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        wait_for(lambda: is_ready(url), 300)
        answers = []

        def ask():
            body = {"prompt": "x", "n": 2, "steps": 100}
            answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=300))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        submitted = 'janusflow_requests_waiting{kind="image"} 4.0'  # two of the six run
        wait_for(lambda: submitted in httpx.get(f"{url}/metrics").text)
        child.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [x.status_code for x in answers] == [200] * 3
        assert child.wait(60) == 0, "".join(lines)
    port = url.rsplit(":", 1)[1]
    with command_line(golden_folder, "--port", port) as (url, child, _):
        wait_for(lambda: is_ready(url), 300)
        threading.Timer(0.3, child.kill).start()
        with pytest.raises(httpx.TransportError):
            body = {"prompt": "x", "n": 10, "steps": 100}
            httpx.post(f"{url}/v1/images/generations", json=body, timeout=300)
    with command_line(golden_folder, "--port", port) as (url, _, _):
        wait_for(lambda: is_ready(url), 300)
        body = {"prompt": "x", "steps": 2}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=300)
        assert answer.status_code == 200


@pytest.mark.slow
def test_a_signal_while_it_compiles_ends_the_command(golden_folder):
    with command_line(golden_folder) as (url, child, lines):
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0, "".join(lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "JANUSFLOW_API_KEY"),
        (["--max-n", "0"], "n: expected 1 to 100"),
        (["--max-images", "9"], "images: expected 1 to 8"),
        (["--context", "100"], "multiple of 64"),
    ],
)
def test_bad_options_are_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        command.check(command.parse(["--model", "x", *options]))


def test_options_reach_the_engine_and_the_limits(tmp_path, monkeypatch):
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    (tmp_path / "keys").write_text("first\n\nsecond\n")
    options = ["--public", "--rows", "2", "--max-size", "512", "--host", "0.0.0.0"]
    options += ["--api-key-file", str(tmp_path / "keys")]
    settings, limits, keys = command.check(command.parse(["--model", "x", *options]))
    assert settings == EngineSettings(rows=2, queue_per_client=2)
    assert limits == Limits(n=4, steps=50, size=512)
    assert keys == ["first", "second"]
