"""The server on a real socket, on an engine without a model: OpenAI's client, keys, draining."""

import asyncio
import base64
import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from helpers import fake_engine
from helpers.fake_engine import FakeEngine, serving, wait_for
from PIL import Image

from janusflow_jax.data import image_files
from janusflow_jax.serve import app, command, listen
from janusflow_jax.serve.limits import Limits

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def opened(data):
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def png(size=(40, 30), mode="RGB", color=0):
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, "PNG")
    return out.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
LOOK = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is it"},
            {"type": "image_url", "image_url": {"url": DATA_URL}},
        ],
    }
]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "fake" and client.models.retrieve("fake").id == "fake"
    about = model.model_extra["janusflow"]
    assert about["image_size"] == 32 and about["generates"] and about["limits"]["n"] == 10
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_images(client):
    settings = {"seed": 7, "num_inference_steps": 3, "unknown": 1}
    answer = client.images.generate(
        model="fake", prompt="a ré", n=2, response_format="b64_json", extra_body=settings
    )
    assert [x.model_extra["seed"] for x in answer.data] == [7, 8]
    assert answer.model_extra["ignored"] == ["unknown"]
    assert answer.usage.total_tokens == 4 + 2 * 16
    for seed, item in zip((7, 8), answer.data, strict=True):
        image = opened(item.b64_json)
        np.testing.assert_array_equal(np.asarray(image), FakeEngine.pixels(seed))
        settings = json.loads(image.text[image_files.TEXT_KEY])
        assert settings | {"prompt": "a ré", "seed": seed, "num_inference_steps": 3} == settings
        assert image_files.SOURCE_TYPE in image.text["XML:com.adobe.xmp"]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_formats_and_sizes(client, format):
    answer = client.images.generate(
        model="fake", prompt="x", size="64x64", output_format=format, output_compression=80
    )
    image = opened(answer.data[0].b64_json)
    assert (image.format, image.size) == (format.upper(), (64, 64))
    assert answer.model_extra["native_size"] == "32x32"


def test_streamed_images(client):
    settings = {"seed": 1, "num_inference_steps": 9}
    stream = client.images.generate(
        model="fake", prompt="x", stream=True, partial_images=2, extra_body=settings
    )
    first, second, last = stream
    assert [first.partial_image_index, second.partial_image_index] == [0, 1]
    assert first.type == "image_generation.partial_image"
    assert last.type == "image_generation.completed"
    np.testing.assert_array_equal(np.asarray(opened(first.b64_json)), FakeEngine.pixels(1 + 3))
    np.testing.assert_array_equal(np.asarray(opened(last.b64_json)), FakeEngine.pixels(1))
    assert last.usage.output_tokens == 16


def test_several_streamed_images(client):
    settings = {"seed": 1, "num_inference_steps": 4}
    stream = client.images.generate(
        model="fake", prompt="x", n=2, stream=True, partial_images=1, extra_body=settings
    )
    seen = [
        (e.type.split(".")[1], e.model_extra["seed"], e.model_extra["image_index"]) for e in stream
    ]
    assert seen == [
        ("partial_image", 1, 0),
        ("completed", 1, 0),
        ("partial_image", 2, 1),
        ("completed", 2, 1),
    ]


def test_edits(client, engine):
    answer = client.images.edit(
        model="fake", image=png(), mask=png(mode="L", color=255), prompt="x", extra_body={"seed": 3}
    )
    assert answer.model_extra["method"] == "flow_inpaint"
    assert engine.seen[-1].mask.all() and engine.seen[-1].seeds == (3,)
    stream = client.images.edit(
        model="fake",
        image=[png()],
        prompt="x",
        stream=True,
        extra_body={"strength": 0.3, "guidance_interval": [0, 0.6]},
    )
    assert [e.type for e in stream] == ["image_edit.completed"]
    assert engine.seen[-1].strength == 0.3 and engine.seen[-1].mask is None
    assert engine.seen[-1].sampler.guide_until == 0.6


def test_chat(client):
    answer = client.chat.completions.create(model="fake", messages=LOOK, max_tokens=2)
    assert answer.choices[0].message.content == "what is"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 7 + 2


def test_streamed_chat(client):
    stream = client.chat.completions.create(
        model="fake", messages=LOOK, stream=True, stream_options={"include_usage": True}
    )
    *chunks, end, usage = stream
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == "what is it [1 images]"
    assert end.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("call", "kind", "code"),
    [
        (lambda c: c.images.generate(prompt=""), openai.BadRequestError, "invalid_value"),
        (
            lambda c: c.images.generate(prompt="too long"),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (
            lambda c: c.images.generate(model="x", prompt="y"),
            openai.NotFoundError,
            "model_not_found",
        ),
        (
            lambda c: c.images.generate(prompt="fail not_finite"),
            openai.InternalServerError,
            "not_finite",
        ),
        (
            lambda c: c.images.generate(prompt="fail engine_reset"),
            openai.InternalServerError,
            "engine_reset",
        ),
        (lambda c: c.images.edit(image=b"x", prompt="y"), openai.BadRequestError, "invalid_image"),
        (lambda c: c.get("/other", cast_to=object), openai.NotFoundError, None),
        (lambda c: c.get("/chat/completions", cast_to=object), openai.APIStatusError, None),
    ],
)
def test_errors_are_openais(client, call, kind, code):
    with pytest.raises(kind) as caught:
        call(client)
    assert caught.value.code == code
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_failure_in_a_stream_is_an_event(client):
    stream = client.images.generate(model="fake", prompt="fail deadline", stream=True)
    with pytest.raises(openai.APIError, match="it failed"):
        list(stream)


def test_requests_as_other_clients_send_them(url):
    """As their sources write them: lmms-eval, VLMEvalKit, Open WebUI."""
    lmms = {
        "model": "fake",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": DATA_URL}},
                    {"type": "text", "text": "Is there a dog?\nAnswer yes or no."},
                ],
            }
        ],
        "max_tokens": 1024,
        "temperature": 0,
    }
    vlmeval = {
        "model": "fake",
        "messages": [
            {"role": "system", "content": "You are an assistant."},
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": DATA_URL, "detail": "high", "min_pixels": 1},
                    },
                    {"type": "text", "text": "Which letter?"},
                ],
            },
        ],
        "max_tokens": 16384,
        "n": 1,
        "temperature": 0,
        "repetition_penalty": 1.0,
    }
    headers = {"Authorization": "Bearer sk-123"}
    for body in (lmms, vlmeval):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        content = answer.json()["choices"][0]["message"]["content"]
        assert answer.status_code == 200 and isinstance(content, str), answer.text
    image = {
        "model": "fake",
        "prompt": "a fox",
        "n": 1,
        "size": "512x512",
        "response_format": "b64_json",
    }
    answer = httpx.post(f"{url}/v1/images/generations", json=image, headers=headers)
    assert opened(answer.json()["data"][0]["b64_json"]).size == (512, 512)
    form = {"model": "fake", "prompt": "a fox", "n": "1", "size": "512x512"}
    files = [("image[]", ("image.png", png(), "image/png"))]
    answer = httpx.post(f"{url}/v1/images/edits", data=form, files=files, headers=headers)
    assert answer.status_code == 200, answer.text
    title = {"model": "fake", "stream": False, "messages": [{"role": "user", "content": "Title?"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=title | {"metadata": {"a": 1}})
    assert answer.json()["ignored"] == ["metadata"]


def test_metrics_have_a_bounded_number_of_routes(url):
    httpx.get(f"{url}/v1/secret-{time.time()}")
    text = httpx.get(f"{url}/metrics").text
    assert 'janusflow_requests_total{code="404",route="other"}' in text
    assert "secret" not in text
    assert 'janusflow_step_seconds_bucket{le="+Inf"} 5.0' in text
    assert "janusflow_rows 2.0" in text


def test_the_id_of_a_request_comes_back(url):
    given = httpx.get(f"{url}/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    odd = httpx.get(f"{url}/health", headers={"x-request-id": 'a"b'})
    assert len(odd.headers["x-request-id"]) == 32


def test_a_path_forges_no_line_of_the_log(url, caplog):
    caplog.set_level("INFO", "janusflow_jax.serve")
    httpx.get(f"{url}/x%0aINFO%20forged%1b[31m{'y' * 1000}")
    lines = lambda: [x for x in caplog.messages if "INFO forged" in x]  # noqa: E731
    wait_for(lines)
    (line,) = lines()
    assert line.isprintable() and len(line) < 300


def test_keys():
    with serving(FakeEngine(), keys=["first", "second"]) as url:
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(url + path).status_code == 401
        for path in ("/health", "/ready"):
            assert httpx.get(url + path).status_code == 200
        for key in ("first", "second"):
            openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list()
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{url}/v1", api_key="third").models.list()
        assert caught.value.code == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "first"}).status_code == 401


def test_other_hosts_and_origins(url):
    def status(**headers):
        return httpx.get(f"{url}/v1/models", headers=headers).status_code

    place = url.removeprefix("http://")
    assert status(Host="evil.example") == 400 == status(Host="127.0.0.1.evil.example")
    assert status(Host="localhost:1") == 200 == status(Host="[::1]:80")
    assert status(Host="[::1") == 400
    assert status(Origin="http://evil.example") == 403 == status(Origin="null")
    assert status(Origin=f"http://{place}") == 200
    with serving(FakeEngine(), origins=["http://a.example"], hosts=()) as other:
        answer = httpx.get(f"{other}/v1/models", headers={"Origin": "http://a.example"})
        assert answer.headers["access-control-allow-origin"] == "http://a.example"
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        refused = httpx.options(f"{other}/v1/images/generations", headers=asked)
        assert refused.status_code == 400
        assert httpx.get(f"{other}/v1/models", headers={"Host": "any"}).status_code == 200


def test_another_address_of_the_loopback_is_a_host_name():
    hosts = command.host_names(command.parse(["--model", "m", "--host", "127.0.0.2"]))
    with serving(FakeEngine(), hosts=hosts) as url:
        for host, status in {"127.0.0.2:80": 200, "localhost": 200, "evil.example": 400}.items():
            assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == status


def test_strangers_of_a_space_have_limits_of_their_own():
    """Behind the Space's proxy, even one who writes another address in front of theirs."""
    text = (ROOT / "launch/space/Dockerfile").read_text().replace("\\\n", "")
    (line,) = [x for x in text.splitlines() if x.startswith("CMD ")]
    args = command.parse(json.loads(line.removeprefix("CMD "))[3:])
    engine = FakeEngine()
    server = app.Server(engine, fake_engine.MODEL, Limits(), hosts=())
    config = listen.DrainingServer(server, 1.0, args.trusted_proxies).config
    config.load()

    async def ask(peer, forwarded):
        transport = httpx.ASGITransport(config.loaded_app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://a.hf.space") as client:
            headers = {"X-Forwarded-For": forwarded}
            answer = await client.post(
                "/v1/images/generations", json={"prompt": "x"}, headers=headers
            )
            assert answer.status_code == 200
        return engine.seen[-1].client

    engine.start()
    assert asyncio.run(ask("10.16.3.80", "1.2.3.4")) == "1.2.3.4"
    assert asyncio.run(ask("10.16.3.80", "6.6.6.6, 1.2.3.4, 10.16.40.1")) == "1.2.3.4"
    assert asyncio.run(ask("8.8.8.8", "1.2.3.4")) == "8.8.8.8"
    engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(stream):
    engine = FakeEngine(step=0.02)
    with serving(engine) as url:
        body = {"prompt": "x", "steps": 100, "n": 10, "stream": stream}
        with contextlib.suppress(httpx.ReadTimeout):
            with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=0.3) as r:
                for _ in r.iter_bytes():
                    break
        wait_for(lambda: engine.counters["failed_cancelled"] == 1, 5)
        assert not engine.running


def test_a_full_queue_is_told():
    engine = FakeEngine(max_queue=1, step=0.02)
    with serving(engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        threads = [
            threading.Thread(target=client.images.generate, kwargs={"prompt": "x"})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
            wait_for(lambda: engine.running)
        wait_for(lambda: engine.jobs.qsize() == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="x")
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "2"
        for thread in threads:
            thread.join()


def test_draining_refuses_new_requests_and_ends_running_ones():
    engine = FakeEngine(step=0.02)
    server = app.Server(engine, fake_engine.MODEL, Limits())
    answers = []
    with fake_engine.listening(server) as url:

        def ask():
            answers.append(httpx.post(f"{url}/v1/images/generations", json={"prompt": "x"}))

        running = threading.Thread(target=ask)
        running.start()
        wait_for(lambda: engine.running)
        drained = threading.Thread(target=engine.drain, args=(10.0,))
        drained.start()
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/images/generations", json={"prompt": "x"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert httpx.get(f"{url}/health").status_code == 200
        running.join()
        drained.join()
    assert answers[0].status_code == 200


def test_an_engine_that_fails_ends_the_server():
    engine = FakeEngine()
    engine.error = "it broke"
    server = app.Server(engine, fake_engine.MODEL, Limits())
    http = listen.DrainingServer(server, 1.0)
    http.run(sockets=[listen.bind("127.0.0.1", 0)])
    assert http.error == "it broke"


PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from helpers import fake_engine
from janusflow_jax.serve import app, listen
from janusflow_jax.serve.limits import Limits
server = app.Server(fake_engine.FakeEngine(step=0.02), fake_engine.MODEL, Limits())
sock = listen.bind("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
listen.DrainingServer(server, 10.0).run(sockets=[sock])
"""


@contextlib.contextmanager
def process():
    code = PROGRAM.format(root=str(ROOT))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        try:
            url = f"http://127.0.0.1:{child.stdout.readline().strip()}"
            wait_for(lambda: is_ready(url))
            yield url, child
        finally:
            child.kill()


def is_ready(url):
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_loses_no_promised_answer():
    with process() as (url, child):
        answers = []

        def ask(stream):
            body = {"prompt": "x", "n": 2, "seed": 5, "steps": 30, "stream": stream}
            answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=60))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        text = lambda: httpx.get(f"{url}/metrics").text  # noqa: E731
        wait_for(lambda: 'waiting{kind="image"} 1.0' in text() and "rows_used 2.0" in text())
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)  # it still listens
        for thread in threads:
            thread.join()
        assert [x.status_code for x in answers] == [200, 200]
        assert len([x for x in answers if x.text.count("image_generation.completed")]) == 1
        assert child.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_second_signal_ends_at_once():
    with process() as (url, child):
        body = {"prompt": "x", "n": 10, "steps": 100}
        ask = lambda: httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)  # noqa: E731
        with pytest.raises(httpx.TransportError):
            threading.Timer(0.5, child.send_signal, [signal.SIGTERM]).start()
            threading.Timer(1.0, child.send_signal, [signal.SIGTERM]).start()
            ask()
        assert child.wait(5) == 128 + signal.SIGTERM


def test_a_server_can_be_killed_and_started_again_at_once():
    with process() as (url, child):
        child.kill()
        child.wait()
        sock = listen.bind("127.0.0.1", int(url.rsplit(":", 1)[1]))
        sock.close()


def test_a_port_in_use_is_one_sentence(url):
    with pytest.raises(ValueError, match="--port .* expected a free address"):
        listen.bind("127.0.0.1", int(url.rsplit(":", 1)[1]))
