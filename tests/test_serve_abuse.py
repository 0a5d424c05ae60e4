"""Hostile and broken clients: each gets a clear 4xx, or its connection ends."""

import concurrent.futures
import contextlib
import gzip
import json
import socket
import time
import types

import httpx
import pytest
import uvicorn
import uvicorn.server
from helpers import fake_engine
from helpers.fake_engine import FakeEngine, raw, serving, wait_for

from janusflow_jax.serve import guard
from janusflow_jax.serve.limits import MIB, Limits

TIMES = {"header_seconds": 0.4, "body_seconds": 0.4, "stall_seconds": 0.4}
LIMITS = Limits(body_mib=2, **TIMES)
PATH = "/v1/images/generations"
CLIENT = httpx.Client(timeout=60)  # one, because each loads certificates


@pytest.fixture(scope="module")
def url():
    with serving(FakeEngine(), LIMITS) as url:
        yield url
        assert CLIENT.get(f"{url}/health").status_code == 200


def head(length, path=PATH, kind="application/json", more=""):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n{more}\r\n"
    ).encode()


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", b"GET /health HT", b"POST"]
)
def test_a_header_that_never_ends_is_closed(url, data):
    begin = time.monotonic()
    raw(url, data)
    assert time.monotonic() - begin < 5


def test_the_second_header_of_a_connection_is_timed_too(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        sock.sendall(b"GET /hea")
        while sock.recv(4096):
            pass
        assert time.monotonic() - begin < 4  # uvicorn itself closes what is silent after 5 s


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head(1000) + b"{", b"408"),
        (head(10 * 2**30) + b"x" * 1000, b"413"),
        (head(3 * MIB) + b"1" * (3 * MIB), b"413"),
        (head(2, more="Transfer-Encoding: chunked\r\n") + b"zz\r\n", b"4"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00" + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", b"4"),
        (head(-5), b"400"),
        (head(2, kind="text/plain") + b"{}", b"415"),
        (head(30, more="Content-Encoding: gzip\r\n") + gzip.compress(b"{}")[:30], b"415"),
        (head(100_000) + b"[" * 100_000, b"400"),
        (head(20_000) + b'{"prompt": ' + b"[" * 9_989, b"4"),
        (head(2) + b"[]", b"400"),
    ],
)
def test_what_is_wrong_on_the_wire_is_told(url, data, status):
    answer = raw(url, data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]


@pytest.mark.parametrize("depth", [10, 400, 800, 900, 950, 970, 990, 5000])
@pytest.mark.parametrize("name", ["prompt", "messages", "seed"])
def test_nested_values_are_no_internal_error(url, depth, name):
    path = "/v1/chat/completions" if name == "messages" else PATH
    value = "[" * depth + "]" * depth
    body = f'{{"prompt": "x", "{name}": {value}}}'.replace('"prompt": "x", "prompt"', '"prompt"')
    headers = {"Content-Type": "application/json"}
    assert CLIENT.post(url + path, content=body, headers=headers).status_code == 400


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        (FORM, b"--y\r\n\r\n"),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
            + b"a" * 70_000
            + b"\r\n--x--",
        ),
        (FORM, (PART + b"1\r\n") * 100 + b"--x--"),
    ],
)
def test_broken_forms(url, kind, body):
    headers = {"Content-Type": kind}
    answer = CLIENT.post(f"{url}/v1/images/edits", content=body, headers=headers)
    assert answer.status_code == 400 and "error" in answer.json(), answer.text


def test_a_client_that_does_not_read_its_answer_is_left():
    """The engine is free again, although the client stays connected."""
    with serving(FakeEngine(), LIMITS) as url:
        host, port = url.removeprefix("http://").split(":")
        body = {"prompt": "x", "n": 10, "stream": True, "partial_images": 8, "size": "256x256"}
        text = json.dumps(body).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(head(len(text)) + text)
            ended = f'janusflow_requests_total{{code="200",route="{PATH}"}} 1.0'
            wait_for(lambda: ended in metrics(url), 20)  # of 90 images of 200 kB


class Connection:
    """A connection's transport and clock, both moved by a test."""

    def __init__(self, stall_seconds):
        self.unsent, self.is_aborted, self.timers, self.now = 0, False, [], 0.0
        limits = Limits(stall_seconds=stall_seconds)
        protocol = type("Protocol", (guard.TimedProtocol,), {"limits": limits})
        config = uvicorn.Config(None, log_config=None)
        self.protocol = protocol(config, uvicorn.server.ServerState(), {}, self)
        self.protocol.connection_made(self)
        self.protocol.header_timer.cancel()
        self.protocol.cycle = types.SimpleNamespace(response_complete=False)

    def get_extra_info(self, name):
        return None

    def get_write_buffer_size(self):
        return self.unsent

    def abort(self):
        self.is_aborted = True

    def close(self):
        pass

    def is_closing(self):
        return False

    def call_later(self, seconds, callback, *args):
        timer = types.SimpleNamespace(at=self.now + seconds, run=lambda: callback(*args))
        timer.cancel = lambda: timer in self.timers and self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def pass_time(self, seconds):
        self.now += seconds
        for timer in [x for x in self.timers if x.at <= self.now]:
            self.timers.remove(timer)
            timer.run()

    def pause(self, unsent):
        self.unsent = unsent
        self.protocol.pause_writing()

    def resume(self):
        self.unsent = 10
        self.protocol.resume_writing()


def test_a_client_that_reads_is_not_left():
    connection = Connection(stall_seconds=30.0)
    for k in range(20):  # events that grow
        connection.pause(1000 + k)
        connection.pass_time(10)
        connection.resume()
        connection.pass_time(3)
        assert not connection.is_aborted and len(connection.timers) <= 1
    connection.pause(1000)
    for unsent in (900, 500, 499, 100):  # slowly
        connection.unsent = unsent
        connection.pass_time(30)
    assert not connection.is_aborted
    connection.pass_time(30)
    assert connection.is_aborted


def test_the_next_answer_of_a_connection_is_no_stall():
    connection = Connection(stall_seconds=30.0)
    connection.unsent, connection.protocol.cycle.response_complete = 50, True
    connection.protocol.on_response_complete()
    connection.pass_time(4)
    connection.protocol.data_received(b"GET / HTTP/1.1\r\n")  # the next request begins
    connection.protocol.cycle = types.SimpleNamespace(response_complete=False)
    connection.protocol.data_received(b"Host: x\r\n")
    connection.unsent = 60
    connection.pass_time(26)
    assert not connection.is_aborted
    connection.protocol.cycle.response_complete = True
    connection.protocol.on_response_complete()
    connection.pass_time(30)
    assert connection.is_aborted


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure(url, caplog):
    host, port = url.removeprefix("http://").split(":")
    path = "/v1/images/edits"  # of which no other test is left
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head(100_000, path, "multipart/form-data; boundary=x") + b"--x")
        time.sleep(0.1)
    wait_for(lambda: f'requests_total{{code="499",route="{path}"}} 1.0' in metrics(url), 10)
    assert not [x for x in caplog.records if x.exc_info]


def metrics(url):
    return CLIENT.get(f"{url}/metrics").text


def test_hundreds_of_connections_do_not_stop_the_server():
    limits = Limits(connections=50, **TIMES)
    with serving(FakeEngine(), limits) as url, contextlib.ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(300):
            stack.enter_context(socket.create_connection((host, int(port))))
        refused = CLIENT.get(f"{url}/health")
        assert refused.status_code in (200, 503)
        wait_for(lambda: CLIENT.get(f"{url}/health").status_code == 200, 10)


def test_bodies_share_a_memory_limit(monkeypatch):
    monkeypatch.setattr(guard, "BUFFERED_MIB", 1)
    with serving(FakeEngine(), Limits(body_mib=2)) as url:
        body = b'{"prompt": "x", "a": "' + b"a" * (MIB + MIB // 2) + b'"}'
        headers = {"Content-Type": "application/json"}
        assert CLIENT.post(url + PATH, content=body, headers=headers).status_code == 503
        assert CLIENT.post(url + PATH, json={"prompt": "x"}).status_code == 200


def test_an_overload_is_answered_by_200_and_429_only():
    with serving(FakeEngine(max_queue=16, step=0.005)) as url:

        def ask(seed):
            body = {"prompt": "x", "seed": seed, "steps": 4}
            answer = CLIENT.post(url + PATH, json=body, timeout=60)
            if answer.status_code == 200:
                assert answer.json()["data"][0]["seed"] == seed
            return answer.status_code

        with concurrent.futures.ThreadPoolExecutor(60) as pool:
            codes = list(pool.map(ask, range(60)))
        assert {*codes} == {200, 429}
        assert codes.count(200) >= 16
        assert fake_engine.MODEL.name in CLIENT.get(f"{url}/v1/models").text
