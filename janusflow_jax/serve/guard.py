"""Who may ask, and how much may arrive: what stands before every route.

Host names against DNS rebinding, origins against forms of other pages, keys, sizes and times.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from janusflow_jax.serve import answers
from janusflow_jax.serve.limits import MIB, Limits, RequestError

LOG = logging.getLogger("janusflow_jax.serve")
NOT_STARTED = 499
"""The status in logs and metrics of a request whose client left before the answer."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
NEEDS_KEY = ("/v1/", "/metrics")
DRAIN_FACTOR = 4
"""A body that is too large is read and dropped up to this many times the limit: a client that is
still sending would not see the answer."""
BUFFERED_MIB = 512
"""Of all bodies that are being read or decoded."""


def error_response(error: RequestError) -> Response:
    return Response(
        answers.dumps(error.body()),
        error.status,
        headers=error.headers,
        media_type="application/json",
    )


class Guard:
    """Refuses requests of strangers, and counts and logs all of them.

    Sets `client` in the request's state: a name that has nothing of the key in it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Sequence[str],
        origins: Sequence[str],
        keys: Sequence[str],
        on_answer: Callable[[str, int, float, str], None],
    ):
        """
        Args:
          hosts: names that the Host header may have; empty: any.
          origins: of other pages that may ask.
          keys: of the API; empty: anybody.
          on_answer: gets path, status (499: the client left), seconds and the request's id.
        """
        self.app, self.hosts, self.origins = app, {h.lower() for h in hosts}, {*origins}
        self.keys, self.on_answer = [k.encode() for k in keys], on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, begin, status = Headers(scope=scope), time.monotonic(), NOT_STARTED
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[\w.-]{1,64}", request_id, re.ASCII):
            request_id = uuid.uuid4().hex

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["x-content-type-options"] = "nosniff"
                status = message["status"]
            await send(message)

        try:
            scope.setdefault("state", {})["client"] = self._client(scope, headers)
            await self.app(scope, receive, send_named)
        except RequestError as error:
            await error_response(error)(scope, receive, send_named)
        except ClientDisconnect:
            pass  # in the middle of its body
        except Exception:
            LOG.exception("request %s", request_id)
            if status != NOT_STARTED:
                raise  # the connection ends in the middle of the answer
            error = RequestError(f"internal error; the log has it under {request_id}", 500)
            await error_response(error)(scope, receive, send_named)
        finally:
            self.on_answer(scope["path"], status, time.monotonic() - begin, request_id)

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Who asks.

        Raises: RequestError: one who may not.
        """
        host = headers.get("host", "")
        if self.hosts and _name_of(host) not in self.hosts:
            raise RequestError(
                f"Host: expected one of {sorted(self.hosts)}; got {host!a:.80}: use such an "
                "address, or start the server with --allowed-hosts",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin and not self.origins & {origin, "*"} and _place_of(origin) != host:
            raise RequestError(
                f"Origin: expected this server's own page; got {origin!a:.80}: start the server "
                "with --cors to let another page use it",
                403,
                code="origin_not_allowed",
            )
        if not self.keys:
            return (scope.get("client") or ("local",))[0]
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode() if scheme.lower() == "bearer" else b""
        # Compares with every key, so that the time tells nothing of them.
        if any([hmac.compare_digest(sent, key) for key in self.keys]):  # noqa: C419
            return f"key-{hashlib.sha256(sent).hexdigest()[:12]}"
        if scope["path"].startswith(NEEDS_KEY):
            raise RequestError(
                "Authorization: expected 'Bearer KEY' with a key of this server; got "
                + ("another" if sent else "none"),
                401,
                code="invalid_api_key",
            )
        return ""


def _name_of(host: str) -> str:
    """'[::1]:8000' -> '::1'; '' where it is malformed."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place_of(origin: str) -> str:
    """'https://a.org:8000' -> 'a.org:8000'; '' where it is malformed or 'null'."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


class Bodies:
    """Reads bodies of requests within limits of size, time and memory."""

    def __init__(self, limits: Limits):
        self.limits, self.buffered = limits, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, media_type: str) -> AsyncIterator[bytes]:
        """The body; its memory counts until the block ends.

        Raises: RequestError.
        """
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != media_type:
            raise RequestError(
                f"Content-Type: expected {media_type}; got {sent!a:.80}", 415, close=True
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError("Content-Encoding: expected none", 415, close=True)
        data = bytearray()
        try:
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    await self._fill(data, request)
            except TimeoutError as error:
                seconds = f"{self.limits.body_seconds:g} s"
                raise RequestError(
                    f"body: expected all within {seconds}", 408, close=True
                ) from error
            yield bytes(data)
        finally:
            self.buffered -= len(data)

    async def _fill(self, data: bytearray, request: Request) -> None:
        most = self.limits.body_mib * MIB
        too_large = RequestError(
            f"body: expected at most {self.limits.body_mib} MiB", 413, close=True
        )
        if int(request.headers.get("content-length", 0)) > DRAIN_FACTOR * most:
            raise too_large
        received = 0
        async for part in request.stream():
            received += len(part)
            if received <= most:
                data += part
                self.buffered += len(part)
            elif received > DRAIN_FACTOR * most:
                raise too_large
            if self.buffered > BUFFERED_MIB * MIB:
                raise RequestError(
                    "body: the server is reading too many large ones at once",
                    503,
                    retry_after=answers.RETRY_SECONDS,
                    close=True,
                )
        if received > most:
            raise too_large


class TimedProtocol(H11Protocol):
    """Ends connections whose client is too slow; uvicorn would wait for ever.

    A request's header must come within `header_seconds`, and a client must take some of an answer
    in every `stall_seconds`. Use a subclass with the server's `limits`.
    """

    limits = Limits()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.header_timer: asyncio.TimerHandle | None = None
        self.stall_timer: asyncio.TimerHandle | None = None
        self._time_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_header()
        self._time_reading()

    def _time_header(self) -> None:
        """Starts the clock while a header is incomplete, and stops it when it has come."""
        if self.conn.their_state is not h11.IDLE:
            if self.header_timer:
                self.header_timer.cancel()
            self.header_timer = None
        elif self.header_timer is None:
            seconds = self.limits.header_seconds
            self.header_timer = self.loop.call_later(seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.header_timer, self.stall_timer):
            if timer:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._time_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_reading()

    def _time_reading(self) -> None:
        """Starts the clock while an answer waits for its client, and stops it when it goes on.

        It runs only while nothing is written: what is unsent can then only become less.
        """
        unsent = self.transport.get_write_buffer_size()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and not self.flow.write_paused:
            if self.stall_timer:
                self.stall_timer.cancel()
            self.stall_timer = None
        elif unsent and self.stall_timer is None:
            seconds = self.limits.stall_seconds
            self.stall_timer = self.loop.call_later(seconds, self._end_if_stalled, unsent)

    def _end_if_stalled(self, before: int) -> None:
        """Ends the connection if no less is unsent than `before`."""
        self.stall_timer = None
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._time_reading()
