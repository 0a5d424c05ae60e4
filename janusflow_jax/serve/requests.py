"""What callers and an engine exchange: requests, events, settings, status. No JAX.

A request enters with `Engine.submit(request, on_event)`. Its events come in order, from the
engine's thread; exactly one `Finished` or `Failed` is the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from janusflow_jax.config import SamplerConfig, StudentConfig
from janusflow_jax.config.errors import JanusFlowError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageRequest:
    """Images of one prompt, one a seed.

    With `image` it is image-to-image: of the path's steps the last `round(strength * steps)` are
    run. With `mask` as well it is inpainting: pixels where the mask is False come out unchanged.
    """

    id: str
    client: str  # who is treated fairly against whom
    prompt: str  # plain user text; special strings in it are text
    seeds: tuple[int, ...]
    guidance_scale: float = 2.0
    sampler: SamplerConfig = SamplerConfig()  # steps, order, shift, guidance interval
    previews: int = 0  # evenly spaced estimates of each finished image, while it is generated
    image: UInt8[np.ndarray, "H W 3"] | None = None  # square, of the model's size
    strength: float = 1.0
    mask: Bool[np.ndarray, "H W"] | None = None  # True: generate again; False: keep
    deadline: float | None = None  # by the clock of the engine, time.monotonic()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChatRequest:
    """The next answer of one conversation.

    `messages` and the order of `images` are what `chat_format.parse_messages` returns.
    """

    id: str
    client: str
    messages: list[dict[str, Any]]
    images: tuple[UInt8[np.ndarray, "_ _ 3"], ...] = ()  # of any size
    max_tokens: int = 512  # the context may end an answer earlier
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    deadline: float | None = None


Request = ImageRequest | ChatRequest


@dataclasses.dataclass(frozen=True)
class Queued:
    """The request waits; `position` counts the images and chats ahead of it."""

    position: int


@dataclasses.dataclass(frozen=True, eq=False)
class Preview:
    """Where image `index` of the request is heading after `step` steps."""

    index: int
    step: int
    image: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDone:
    index: int
    seed: int
    image: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Text:
    """The next piece of an answer; joined, the pieces are the answer."""

    piece: str


@dataclasses.dataclass(frozen=True)
class Finished:
    reason: str  # images: done; chats: stop (a complete answer) or length
    prompt_tokens: int  # positions of text and images
    completion_tokens: int  # chats: generated tokens; images: positions of the generated images


@dataclasses.dataclass(frozen=True)
class Failed:
    code: str  # not_finite | deadline | engine_reset | draining | cancelled | internal
    message: str


Event = Queued | Preview | ImageDone | Text | Finished | Failed
OnEvent = Callable[[Event], None]
"""Called from the engine's thread: it must return at once and not raise."""


class QueueFull(Exception):
    """`retry_after`: seconds until there is likely room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    rows: int = 8  # branches of images at once; a guided image has two
    lanes: int = 4  # conversations at once
    context: int = 0  # positions of a conversation and its answer; 0: 8 images and some text
    prompt_tokens: int = 256  # of an image's prompt
    queue: int = 128  # images and chats that wait
    queue_per_client: int = 32
    invariant: bool = False  # one program shape: other load changes no bit of a result
    watchdog: float = 120.0  # seconds without a turn after which the engine counts as dead

    def __post_init__(self) -> None:
        least = {"rows": 2, "lanes": 1, "context": 0, "prompt_tokens": 1, "queue": 1}
        least |= {"queue_per_client": 1, "watchdog": 0.0}
        values = dataclasses.asdict(self)
        if self.context % 64:
            raise JanusFlowError(f"context: expected a multiple of 64; got {self.context}")
        if low := [f"{n} >= {x}; got {values[n]}" for n, x in least.items() if values[n] < x]:
            raise JanusFlowError("engine: expected " + "; ".join(low))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What requests may ask for."""

    generates: bool  # the model has the parts for images
    understands: bool  # ... for images in a conversation
    chats: bool
    image_size: int  # side, pixels
    context: int
    prompt_tokens: int
    images_per_chat: int
    student: StudentConfig = StudentConfig()


@dataclasses.dataclass(frozen=True)
class Histogram:
    """`counts[i]` values were at most `bounds[i]`, the last of which is infinity."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float  # sum of the values


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStatus:
    ready: bool  # compiled and not draining
    alive: bool  # the thread takes turns, and was not reset too often
    draining: bool
    rows: int
    rows_used: int
    lanes: int
    lanes_used: int
    waiting_images: int
    waiting_chats: int
    running_images: int
    running_chats: int
    counters: Mapping[str, int]
    """images, previews, chats, prompt_tokens, completion_tokens, row_steps, engine_resets,
    compilations, and failed_<code> for every code of `Failed`; missing ones are 0."""
    histograms: Mapping[str, Histogram]
    """Seconds: queue, image (from submit to ImageDone), first_token, between_tokens (a piece's time
    over its tokens), turn (one step of all rows and a few tokens of all lanes)."""
    error: str = ""  # why it is not alive, if that is known
