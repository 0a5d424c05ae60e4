"""The socket and the process: listening, and ending without losing an answer."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from types import FrameType

import uvicorn

from janusflow_jax.config import signals
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.serve import app, guard

LOG = logging.getLogger("janusflow_jax.serve")
HEADER_BYTES = 64 * 1024
FLUSH_SECONDS = 10
"""After the engine has drained: for answers that are on their way."""


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address that does not listen yet.

    Raises: JanusFlowError: the address is in use, or is not this machine's.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(kind, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JanusFlowError(
            f"--host {host} --port {port}: expected a free address of this machine; {reason}: "
            "choose another, or end the server that uses it"
        ) from error
    return sock


class DrainingServer(uvicorn.Server):
    """On the first signal, new requests are refused and running ones end; the second ends all."""

    def __init__(self, server: app.Server, drain_seconds: float, trusted_proxies: str = ""):
        protocol = type("Protocol", (guard.TimedProtocol,), {"limits": server.limits})
        super().__init__(
            uvicorn.Config(
                server.app,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=trusted_proxies or None,
                limit_concurrency=server.limits.connections,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self.server, self.drain_seconds, self.is_draining = server, drain_seconds, False
        self.error = ""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.is_draining:
            signals.end(sig)
        self.is_draining = True
        threading.Thread(target=self._drain, args=(sig,), name="drain", daemon=True).start()

    def _drain(self, sig: int) -> None:
        name = signal.Signals(sig).name
        LOG.info("%s: running requests have %g s; again: end at once", name, self.drain_seconds)
        if not self.server.engine.drain(self.drain_seconds):
            LOG.info("some requests did not end in time and were cancelled")
        self.end()

    def end(self) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ends with an engine that failed, so that whoever watches the process starts it anew."""
        if counter % 10 == 0:  # of 10 a second
            self.error = self.server.engine.status().error
        return await super().on_tick(counter) or bool(self.error)
