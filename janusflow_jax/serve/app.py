"""The routes: OpenAI's API for both halves of the model, and what operators need."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.serve import answers, checks, guard, metrics, page as page_files
from janusflow_jax.serve.checks import ChatCall, ImageCall, ServedModel
from janusflow_jax.serve.limits import Limits, RequestError
from janusflow_jax.serve.requests import (
    ChatRequest,
    Draining,
    Event,
    Failed,
    Finished,
    ImageDone,
    ImageRequest,
    Preview,
    Queued,
    QueueFull,
    Text,
)

LOG = logging.getLogger("janusflow_jax.serve")
COMMENT_SECONDS = 10.0
"""Proxies close connections on which nothing moves."""
QUIET = ("/health", "/ready", "/metrics")
"""Asked for all the time: not logged."""
MAX_FORM_FILES, MAX_FORM_FIELDS, FORM_PART_BYTES = 8, 64, 64 * 1024
Events = asyncio.Queue[Event]


class Server:
    """An engine behind HTTP. `app` is the ASGI application."""

    def __init__(
        self,
        engine: Any,
        model: ServedModel,
        limits: Limits,
        *,
        hosts: Sequence[str] = guard.LOCAL_HOSTS,
        origins: Sequence[str] = (),
        keys: Sequence[str] = (),
        log_prompts: bool = False,
        page: bool = True,
    ):
        """
        Args:
          engine: a `serve.engine.Engine` or `Replicas`, not started yet: the application starts it,
            and closes it at its end.
          hosts, origins, keys: as of `guard.Guard`.
          log_prompts: whether prompts go to the log.
          page: whether the web page is there.
        """
        self.engine, self.model, self.limits = engine, model, limits
        self.log_prompts = log_prompts
        self.bodies = guard.Bodies(limits)
        self.metrics = metrics.Metrics(engine, model)
        # Decoding an image takes up to a quarter of a second and 200 MiB.
        self.workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "serve")
        middleware = [
            Middleware(
                guard.Guard, hosts=hosts, origins=origins, keys=keys, on_answer=self._on_answer
            )
        ]
        if origins:
            allowed = {"allow_origins": origins, "allow_methods": ["GET", "POST"]}
            cors = Middleware(CORSMiddleware, allow_headers=["*"], **allowed)
            middleware.insert(0, cors)
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/images/generations", self.generations, methods=["POST"]),
                Route("/v1/images/edits", self.edits, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.read_metrics),
                *([_page_route(name) for name in page_files.FILES] if page else []),
            ],
            middleware=middleware,
            exception_handlers={RequestError: _as_response, HTTPException: _as_response},
            lifespan=self._lifespan,
        )

    # The life of the engine

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()  # it compiles, while the server already answers /health
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.close)
            self.workers.shutdown(wait=False, cancel_futures=True)

    # Routes

    async def models(self, request: Request) -> Response:
        return _json(answers.models(self.model, self.limits))

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model.name:
            raise RequestError(
                f"model: expected {self.model.name!r}", 404, param="model", code="model_not_found"
            )
        return _json(answers.describe(self.model, self.limits))

    async def health(self, request: Request) -> Response:
        alive = self.engine.status().alive
        return PlainTextResponse("ok" if alive else "dead", 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        status = self.engine.status()
        state = "ready" if status.ready else "ending" if status.draining else "starting"
        return PlainTextResponse(state, 200 if status.ready else 503)

    async def read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=metrics.MEDIA_TYPE)

    async def generations(self, request: Request) -> Response:
        self._check_ready()
        async with self.bodies.read(request, "application/json") as body:
            call = await self._work(self._checked, checks.generation, body, _client(request))
        return await self._answer_images(request, call)

    async def edits(self, request: Request) -> Response:
        self._check_ready()
        async with self.bodies.read(request, "multipart/form-data") as body:
            texts, files = await _form(request, body)
            images = files.get("image", []) + files.get("image[]", [])
            masks = files.get("mask", [])
            limits, client = self.limits, _client(request)
            call = await self._work(checks.edit, texts, images, masks, self.model, limits, client)
        return await self._answer_images(request, call)

    async def chat(self, request: Request) -> Response:
        self._check_ready()
        async with self.bodies.read(request, "application/json") as body:
            call = await self._work(self._checked, checks.chat, body, _client(request))
        if self.log_prompts:
            LOG.info("%s: %r", call.request.id, call.request.messages[-1]["content"])
        events = await self._submit(call.request)
        if call.stream:
            return self._stream(call, self._chat_stream(call, events))
        return await self._while_connected(request, call, self._whole_chat(call, events))

    def _checked(self, check: Callable, body: bytes, client: str) -> Any:
        """The call that a function of `checks` makes of a JSON body."""
        try:
            return check(checks.json_object(body), self.model, self.limits, client)
        except RecursionError as error:
            raise RequestError("body: expected JSON that is less deeply nested") from error

    # Answers

    async def _answer_images(self, request: Request, call: ImageCall) -> Response:
        if self.log_prompts:
            LOG.info("%s: %r", call.request.id, call.request.prompt)
        events = await self._submit(call.request)
        if call.stream:
            return self._stream(call, self._image_stream(call, events))
        return await self._while_connected(request, call, self._whole_images(call, events))

    async def _whole_images(self, call: ImageCall, events: Events) -> Response:
        encoded = [""] * len(call.request.seeds)
        while not isinstance(event := await _next(events), Finished):
            if isinstance(event, ImageDone):
                encoded[event.index] = await self._encode(call, event)
        return _json(answers.images(call, self.model, encoded, event))

    async def _image_stream(self, call: ImageCall, events: Events) -> AsyncIterator[bytes]:
        partials, left = collections.Counter[int](), len(call.request.seeds)
        async for event in _with_comments(events):
            if isinstance(event, bytes):
                yield event
            elif isinstance(event, Preview):
                encoded, number = await self._encode(call, event), partials[event.index]
                partials[event.index] += 1
                yield answers.server_sent(
                    answers.partial_image(call, self.model, event, number, encoded)
                )
            elif isinstance(event, ImageDone):
                encoded, left = await self._encode(call, event), left - 1
                finished = await _finish(events) if not left else None
                yield answers.server_sent(
                    answers.completed_image(call, self.model, event, encoded, finished)
                )
                if finished:
                    return

    async def _encode(self, call: ImageCall, event: Preview | ImageDone) -> str:
        seed = call.request.seeds[event.index]
        return await self._work(answers.image_base64, event.image, seed, call, self.model)

    async def _whole_chat(self, call: ChatCall, events: Events) -> Response:
        text = ""
        while not isinstance(event := await _next(events), Finished):
            if isinstance(event, Text):
                text += event.piece
        return _json(answers.chat(call, self.model, text, event))

    async def _chat_stream(self, call: ChatCall, events: Events) -> AsyncIterator[bytes]:
        chunk = functools.partial(answers.chat_chunk, call, self.model)
        yield answers.server_sent(chunk({"role": "assistant", "content": ""}))
        async for event in _with_comments(events):
            if isinstance(event, bytes):
                yield event
            elif isinstance(event, Text):
                yield answers.server_sent(chunk({"content": event.piece}))
            elif isinstance(event, Finished):
                yield answers.server_sent(chunk({}, event.reason))
                if call.include_usage:
                    yield answers.server_sent(answers.usage_chunk(call, self.model, event))
                return

    def _stream(self, call: ImageCall | ChatCall, pieces: AsyncIterator[bytes]) -> Response:
        end = functools.partial(self.engine.cancel, call.request.id)
        return EventStream(pieces, end)

    async def _while_connected(
        self, request: Request, call: ImageCall | ChatCall, answer: Coroutine[Any, Any, Response]
    ) -> Response:
        """The answer; if the client hangs up before, the engine drops its request."""
        work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise RequestError("the client left", 499, code="cancelled")
            return work.result()
        finally:
            work.cancel()
            gone.cancel()
            self.engine.cancel(call.request.id)

    # The engine

    def _check_ready(self) -> None:
        """Before the body is read."""
        status = self.engine.status()
        if not status.ready:
            state = "ending" if status.draining else "starting"
            raise RequestError(
                f"the server is {state}: try again",
                503,
                code=state,
                retry_after=answers.RETRY_SECONDS,
            )

    async def _submit(self, request: ImageRequest | ChatRequest) -> Events:
        """Queues a request; its events arrive in the queue that this returns."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            await self._work(self.engine.submit, request, on_event)
        except JanusFlowError as error:
            raise RequestError(str(error), code="context_length_exceeded") from error
        except QueueFull as error:
            raise RequestError(
                str(error), 429, code="queue_full", retry_after=error.retry_after
            ) from error
        except Draining as error:
            raise RequestError(
                str(error), 503, code="draining", retry_after=answers.RETRY_SECONDS
            ) from error
        return events

    async def _work(self, function: Callable, *args: Any) -> Any:
        """Runs what takes milliseconds and more in a worker, so that the loop stays free."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.workers, function, *args)

    def _on_answer(self, path: str, status: int, seconds: float, request_id: str) -> None:
        self.metrics.answered(path, status, seconds)
        if path not in QUIET:
            LOG.info("%.200a %d %.3f s %s", path, status, seconds, request_id)


class EventStream(StreamingResponse):
    """Server-sent events; an error after the first byte is an event too."""

    def __init__(self, pieces: AsyncIterator[bytes], on_end: Callable[[], Any]):
        """
        Args: on_end: called at the end, or when the client hangs up.
        """
        self.on_end = on_end
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_with_end(pieces), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


async def _with_end(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            yield piece
    except RequestError as error:
        yield answers.server_sent({"type": "error", **error.body()})
    yield answers.DONE


async def _next(events: Events) -> Event:
    """Raises: RequestError: the request failed."""
    event = await events.get()
    if isinstance(event, Failed):
        raise answers.failure(event)
    return event


async def _finish(events: Events) -> Finished:
    while not isinstance(event := await _next(events), Finished):
        pass
    return event


async def _with_comments(events: Events) -> AsyncIterator[Event | bytes]:
    """Events, and comments while there are none or the request waits in the queue."""
    state = "running"
    while True:
        try:
            event = await asyncio.wait_for(_next(events), COMMENT_SECONDS)
        except TimeoutError:
            yield answers.comment(state)
            continue
        if isinstance(event, Queued):
            state = f"wait position={event.position}"
            yield answers.comment(state)
        else:
            state = "running"
            yield event


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _form(request: Request, body: bytes) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The texts and files of a form's body, which has been read within limits.

    A text is the last of its name; where the name ends with `[]`, it is the list of all.
    """

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    again = Request(request.scope, receive)
    async with again.form(
        max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS, max_part_size=FORM_PART_BYTES
    ) as form:
        texts, files = {}, collections.defaultdict(list)
        for name, value in form.multi_items():
            if not isinstance(value, str):
                files[name].append(await value.read())
            elif name.endswith("[]"):
                texts.setdefault(name, []).append(value)
            else:
                texts[name] = value
    return texts, files


def _json(value: Any) -> Response:
    return Response(answers.dumps(value), media_type="application/json")


async def _as_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = RequestError(str(error.detail), error.status_code)
    assert isinstance(error, RequestError)
    return guard.error_response(error)


def _client(request: Request) -> str:
    return request.state.client


def _page_route(name: str) -> Route:
    """The route of one file of the page."""
    body, media_type = page_files.FILES[name]

    async def send(request: Request) -> Response:
        return Response(body, media_type=media_type, headers=page_files.HEADERS)

    return Route("/" if name == "index.html" else f"/{name}", send)
