"""An engine without a model, and a server on a real socket."""

import collections
import contextlib
import math
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.serve import app, checks, listen
from janusflow_jax.serve.limits import Limits
from janusflow_jax.serve.requests import (
    ChatRequest,
    Draining,
    EngineLimits,
    EngineStatus,
    Event,
    Failed,
    Finished,
    Histogram,
    ImageDone,
    ImageRequest,
    OnEvent,
    Preview,
    Queued,
    QueueFull,
    Text,
)

SIZE = 32
FULL_LIMITS = EngineLimits(
    generates=True,
    understands=True,
    chats=True,
    image_size=SIZE,
    context=256,
    prompt_tokens=64,
    images_per_chat=8,
)


class FakeEngine:
    """One request at a time: an image shows its seed, an answer repeats the last message.

    A prompt 'fail CODE' fails with that code, and the prompt 'too long' is refused.
    """

    def __init__(self, limits: EngineLimits = FULL_LIMITS, max_queue: int = 16, step: float = 0.0):
        """
        Args: step: seconds of a step of an image or a piece of an answer.
        """
        self.limits, self.max_queue, self.step = limits, max_queue, step
        self.jobs: queue.Queue[Any] = queue.Queue()
        self.cancelled: set[str] = set()
        self.running = self.error = ""
        self.draining, self.idle = False, threading.Event()
        self.counters: collections.Counter[str] = collections.Counter()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.seen: list[ImageRequest | ChatRequest] = []

    def start(self) -> None:
        self.thread.start()

    def submit(self, request: ImageRequest | ChatRequest, on_event: OnEvent) -> None:
        if isinstance(request, ImageRequest) and request.prompt == "too long":
            raise JanusFlowError("prompt: expected at most 64 positions; got 65: shorten it")
        if self.draining:
            raise Draining("the server is ending")
        if self.jobs.qsize() >= self.max_queue:
            raise QueueFull("the queue is full: try again later", retry_after=2.0)
        self.seen.append(request)
        on_event(Queued(self.jobs.qsize()))
        self.jobs.put((request, on_event))

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def drain(self, seconds: float) -> bool:
        self.draining = True
        end = time.monotonic() + seconds
        while time.monotonic() < end and (self.running or self.jobs.qsize()):
            time.sleep(0.01)
        return not self.running

    def close(self) -> None:
        self.jobs.put(None)

    def status(self) -> EngineStatus:
        return EngineStatus(
            ready=self.thread.is_alive() and not self.draining,
            alive=True,
            draining=self.draining,
            rows=2,
            rows_used=2 if self.running else 0,
            lanes=1,
            lanes_used=0,
            waiting_images=self.jobs.qsize(),
            waiting_chats=0,
            running_images=int(bool(self.running)),
            running_chats=0,
            counters=dict(self.counters),
            histograms={"step": Histogram((0.1, 1.0, math.inf), (3, 4, 5), 7.0)},
            error=self.error,
        )

    def _run(self) -> None:
        while job := self.jobs.get():
            request, on_event = job
            self.running = request.id
            on_event(self._serve(request, on_event))
            self.running = ""

    def _serve(self, request: ImageRequest | ChatRequest, on_event: OnEvent) -> Event:
        if isinstance(request, ChatRequest):
            words = "".join(request.messages[-1]["content"]).split()
            if request.images:
                words.append(f"[{len(request.images)} images]")
            kept = words[: request.max_tokens]
            for i, word in enumerate(kept):
                if not self._sleep(request.id):
                    return Failed("cancelled", "cancelled")
                on_event(Text(f" {word}" if i else word))
            return Finished("stop" if kept == words else "length", 7, len(kept))
        if request.prompt.startswith("fail "):
            return Failed(request.prompt.split()[1], "it failed")
        steps = request.sampler.steps
        marks = {round(steps * (j + 1) / (request.previews + 1)) for j in range(request.previews)}
        for index, seed in enumerate(request.seeds):
            for k in range(1, steps + 1):
                if not self._sleep(request.id):
                    return Failed("cancelled", "cancelled")
                if k in marks:
                    on_event(Preview(index, k, self.pixels(seed + k)))
            self.counters["images"] += 1
            on_event(ImageDone(index, seed, self.pixels(seed)))
        return Finished("done", len(request.prompt), 16 * len(request.seeds))

    def _sleep(self, request_id: str) -> bool:
        """Whether to go on."""
        time.sleep(self.step)
        if request_id in self.cancelled:
            self.counters["failed_cancelled"] += 1
            return False
        return True

    @staticmethod
    def pixels(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


MODEL = checks.ServedModel(
    name="fake",
    engine=FULL_LIMITS,
    sha256="00",
    facts={"dtype": "float32"},
    fingerprint="jf-1",
    created=1,
)


@contextlib.contextmanager
def serving(engine: Any, limits: Limits | None = None, model: Any = MODEL, **options: Any) -> Any:
    """Yields the base URL of a server in a thread."""
    server = app.Server(engine, model, limits or Limits(), **options)
    with listening(server) as url:
        yield url


@contextlib.contextmanager
def listening(server: app.Server) -> Iterator[str]:
    sock = listen.bind("127.0.0.1", 0)
    http = listen.DrainingServer(server, 5.0)
    thread = threading.Thread(target=http.run, args=([sock],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        wait_for(lambda: http.started and server.engine.status().ready, 300.0)
        yield url
    finally:
        http.end()
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def raw(url: str, data: bytes, seconds: float = 10.0) -> bytes:
    """What a server answers to bytes on a socket, until it closes; b'' if nothing."""
    host, port = url.removeprefix("http://").split(":")
    out = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            while piece := sock.recv(65536):
                out += piece
    return out
