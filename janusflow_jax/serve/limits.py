"""What one request and one connection may use, and the error that a client gets."""

from __future__ import annotations

from typing import Any

from janusflow_jax.config.fields import between, dataclass, positive

MIB = 2**20
MAX_IMAGES = 8
"""In a conversation."""


@dataclass
class Limits:
    """Each is an option of the command and told by /v1/models.

    The engine has its own: waiting requests, positions of a prompt and of a conversation.
    """

    body_mib: int = positive(20)
    image_mib: int = positive(10)
    image_megapixels: int = positive(16)
    images: int = between(MAX_IMAGES, 1, MAX_IMAGES)  # in one conversation
    prompt_chars: int = positive(4000)
    n: int = between(10, 1, 100)  # images of a request
    steps: int = between(100, 1, 1000)
    guidance_scale: float = between(20.0, 1, 1000)
    partial_images: int = between(8, 0, 100)  # of each image
    size: int = between(1024, 64, 4096)  # side of an answered image, pixels
    connections: int = positive(256)
    header_seconds: float = positive(5.0)
    body_seconds: float = positive(30.0)
    stall_seconds: float = positive(30.0)  # a client must take some of its answer in this time
    deadline_seconds: float = positive(600.0)  # from the request to the end of its answer


PUBLIC = {"n": 4, "steps": 50, "queue_per_client": 2}
"""What `--public` changes: strangers wait in a short queue for small requests."""


class RequestError(Exception):
    """An answer with an error status, in OpenAI's form."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = 0.0,
        close: bool = False,
    ):
        """
        Args:
          param: the field of the request that is wrong.
          code: a word for programs.
          retry_after: seconds, told to the client; 0: trying again is no use.
          close: whether the connection ends, because the rest of the request is not read.
        """
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers: dict[str, str] = {"connection": "close"} if close else {}
        if retry_after:
            self.headers["retry-after"] = str(max(1, round(retry_after)))

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kinds.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}
