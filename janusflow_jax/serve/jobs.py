"""Requests as an engine works on them: checked, tokenized, and how far each has come.

`prepare` runs on the caller's thread; the engine's thread gets arrays and ids.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import images as images_lib
from janusflow_jax.sampling import flow, inputs
from janusflow_jax.serve.requests import ChatRequest, EngineLimits, ImageRequest, OnEvent, Request


@dataclasses.dataclass(kw_only=True, eq=False)
class Job(abc.ABC):
    request: Request
    ids: Sequence[int]  # of the prompt
    on_event: OnEvent = lambda event: None
    since: float = 0.0  # time.monotonic() of submit
    position: int = -1  # the last one told
    cancelled: bool = False
    ended: bool = False

    @property
    def client(self) -> str:
        return self.request.client

    @property
    @abc.abstractmethod
    def waiting(self) -> int:
        """Images or chats that have not begun."""

    @abc.abstractmethod
    def work(self) -> int:
        """Row-steps or tokens that are left."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Image:
    """One image of a job, in its rows: the conditional branch and the other, equal without one."""

    job: ImageJob
    index: int
    rows: tuple[int, int]
    step: int  # steps that it has come


@dataclasses.dataclass(kw_only=True, eq=False)
class ImageJob(Job):
    request: ImageRequest
    first: int  # the first step
    times: np.ndarray  # float32[N + 1]
    lengths: np.ndarray  # h and r/2 of `flow.coefficients`, float32[2, N]
    scales: np.ndarray  # guidance scale of every step, float32[N]; 1 without guidance
    keep: np.ndarray | None  # bool[h, w], the cells of an inpainted image that stay
    begun: int = 0
    done: int = 0
    running: list[Image] = dataclasses.field(default_factory=list)
    prefix: Any = None
    start: Any = None  # latents of the image to start from

    @property
    def steps(self) -> int:
        return len(self.scales)

    @property
    def branches(self) -> int:
        return 2 if (self.scales[self.first :] != 1).any() else 1

    @property
    def waiting(self) -> int:
        return len(self.request.seeds) - self.begun

    def preview_steps(self) -> set[int]:
        count, parts = self.steps - self.first, self.request.previews + 1
        steps = {self.first + round(count * j / parts) for j in range(1, parts)}
        return steps - {self.first, self.steps}

    def image_work(self) -> int:
        return self.branches * (self.steps - self.first)

    def work(self) -> int:
        left = sum(self.steps - image.step for image in self.running)
        return self.waiting * self.image_work() + self.branches * left


@dataclasses.dataclass(kw_only=True, eq=False)
class ChatJob(Job):
    request: ChatRequest
    slot_starts: Sequence[int]
    pixels: Sequence[np.ndarray]  # of its images, uint8[H, W, 3] of the model's size
    max_tokens: int
    lane: int | None = None
    slots: list[Any] = dataclasses.field(default_factory=list)  # vectors of its images
    embedded: Any = None
    prefilled: int = 0  # positions of the prompt
    asked: int = 0  # tokens that the device was asked for
    tokens: list[int] = dataclasses.field(default_factory=list)
    sent: str = ""
    last_piece: float = 0.0  # time

    @property
    def waiting(self) -> int:
        return int(self.lane is None)

    def work(self) -> int:
        return max(len(self.ids) - self.prefilled, 0) + self.max_tokens - len(self.tokens)

    def grow(self, tokens: Sequence[int], text: Any) -> tuple[str, str]:
        """Adds tokens of the device to the answer.

        Args: text: the `ChatFormat`.
        Returns: the next piece of text; why the answer is complete, or ''.
        """
        self.tokens = [*self.tokens, *tokens][: self.max_tokens]
        if text.eos_id in self.tokens:
            self.tokens = self.tokens[: self.tokens.index(text.eos_id) + 1]
            reason = "stop"
        else:
            reason = "length" if len(self.tokens) == self.max_tokens else ""
        answer = text.decode(inputs.before_eos(np.asarray(self.tokens), text.eos_id)).strip()
        answer, stopped = inputs.before_stop(answer, self.request.stop, bool(reason))
        reason = "stop" if stopped else reason
        piece = inputs.next_piece(answer, self.sent, bool(reason))
        self.sent += piece
        return piece, reason


def prepare(request: Request, model: Any, limits: EngineLimits) -> Job:
    """Checks and tokenizes a request.

    Args: model: a `Pipeline`.
    Raises: JanusFlowError: with one sentence, what the request or the model lacks.
    """
    if isinstance(request, ImageRequest):
        return _image_job(request, model, limits)
    return _chat_job(request, model, limits)


def _image_job(request: ImageRequest, model: Any, limits: EngineLimits) -> ImageJob:
    if not limits.generates:
        raise JanusFlowError("images: expected a model that generates images; this one does not")
    cfg, guidance_scale = inputs.check_generate(
        [request.prompt],
        len(request.seeds),
        guidance_scale=request.guidance_scale,
        num_steps=request.sampler.steps,
        order=request.sampler.order,
        shift=request.sampler.shift,
        guidance_interval=(request.sampler.guide_from, request.sampler.guide_until),
        student=limits.student,
    )
    for seed in request.seeds:
        inputs.image_seeds(seed, 1, 1)
    if not 0 <= request.previews <= cfg.steps:
        raise JanusFlowError(f"previews: expected 0 to {cfg.steps}; got {request.previews}")
    ids = model.text.generation_ids(request.prompt)
    longest = min(limits.prompt_tokens, model.text.max_length - model.cfg.slot_len)
    if len(ids) > longest:
        raise JanusFlowError(
            f"prompt: expected at most {longest} tokens; got {len(ids)}: shorten it"
        )
    first, keep = _edit(request, model)
    if guidance_scale == 1:  # as in `Pipeline.generate`: the interval then changes no step
        cfg = dataclasses.replace(cfg, guide_until=0.0)
    scale = np.float32(guidance_scale)
    return ImageJob(
        request=request,
        ids=ids,
        first=first,
        times=flow.step_times(cfg),
        lengths=np.stack(flow.coefficients(cfg, first)),
        scales=np.where(flow.guided_steps(cfg), scale, np.float32(1)),
        keep=keep,
    )


def _edit(request: ImageRequest, model: Any) -> tuple[int, np.ndarray | None]:
    """The first step, and the cells that stay."""
    size = model.cfg.image_size
    if request.image is None:
        if request.mask is not None or request.strength != 1:
            raise JanusFlowError("mask and strength: expected an image with them; got none")
        return 0, None
    if request.image.shape != (size, size, 3) or request.image.dtype != np.uint8:
        got = f"{request.image.dtype}{list(request.image.shape)}"
        raise JanusFlowError(f"image: expected uint8[{size}, {size}, 3]; got {got}")
    if not 0 <= request.strength <= 1:
        raise JanusFlowError(f"strength: expected 0 to 1; got {request.strength!r}")
    first = flow.first_step(request.strength, request.sampler)
    if request.mask is None:
        return first, None
    if request.mask.shape != (size, size) or request.mask.dtype != bool:
        got = f"{request.mask.dtype}{list(request.mask.shape)}"
        raise JanusFlowError(f"mask: expected bool[{size}, {size}]; got {got}")
    return first, ~images_lib.mask_cells(request.mask, model.cfg.latent_shape[0])


def _chat_job(request: ChatRequest, model: Any, limits: EngineLimits) -> ChatJob:
    if not limits.chats:
        raise JanusFlowError("chat: expected a model that answers; this one does not")
    if request.images and not limits.understands:
        raise JanusFlowError("chat: expected no images; got some, which this model does not read")
    if len(request.images) > limits.images_per_chat:
        raise JanusFlowError(
            f"chat: expected at most {limits.images_per_chat} images; got {len(request.images)}"
        )
    inputs.check_chat(request.max_tokens, request.temperature, request.top_p, request.seed)
    inputs.image_seeds(request.seed, 1, 1)
    if not all(isinstance(stop, str) and stop for stop in request.stop):
        raise JanusFlowError(f"stop: expected texts, none of them empty; got {request.stop!r}")
    system, turns = inputs.split_system(request.messages)
    prompt = model.text.conversation(turns, len(request.images), closed=False, system=system)
    room = min(limits.context, model.text.max_length) - len(prompt.ids)
    if room < 1:
        raise JanusFlowError(
            f"chat: expected at most {len(prompt.ids) + room - 1} positions of text and images, so "
            f"that an answer has room; got {len(prompt.ids)}: shorten it"
        )
    size = model.cfg.image_size
    return ChatJob(
        request=request,
        ids=prompt.ids.tolist(),
        slot_starts=prompt.slot_starts,
        pixels=[images_lib.for_understanding(image, size) for image in request.images],
        max_tokens=min(request.max_tokens, room),
    )
