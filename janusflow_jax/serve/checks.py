"""JSON objects and forms of OpenAI's API -> requests of the engine, or every problem at once. Pure.

Fields that are unknown are ignored and named in the answer. A known field that asks for what this
server cannot do is an error, never silently dropped.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from janusflow_jax.config import SamplerConfig
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, image_files, images as images_lib
from janusflow_jax.sampling import inputs
from janusflow_jax.serve.limits import MIB, Limits, RequestError
from janusflow_jax.serve.requests import ChatRequest, EngineLimits, ImageRequest

MAX_ELEMENTS = 200_000
"""Python parses JSON without letting other threads run: 20 MiB of small numbers would stop the
server for a second. Images and text have few elements."""
CHARS_A_POSITION = 16
"""Of a conversation: text that is longer cannot fit, and is not tokenized to find that out."""
STOP_CHARS = 500
DEFAULT_TOKENS = 512
MIN_SIDE = 64


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What answers and checks need to know of the model and its engine."""

    name: str
    engine: EngineLimits
    sha256: str  # of everything that was loaded
    facts: Mapping[str, Any]  # dtype, device, int8, ...: for /v1/models
    fingerprint: str  # equal fingerprints: equal settings give equal results
    created: int  # Unix time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCall:
    """A checked request for images."""

    request: ImageRequest
    format: str
    quality: int
    side: int  # of the answered images, pixels
    stream: bool
    ignored: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A checked request for an answer."""

    request: ChatRequest
    stream: bool
    include_usage: bool
    created: int  # Unix time
    ignored: tuple[str, ...]


def json_object(data: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Some clients nest what OpenAI's Python client adds to the object: `extra_body` is merged.

    Raises: RequestError.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_ELEMENTS:
        raise RequestError(f"body: expected at most {MAX_ELEMENTS} JSON elements")
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_not_json)
    except ValueError as error:
        raise RequestError(f"body: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"body: expected a JSON object; got {type(value).__name__}")
    nested = value.pop("extra_body", None)
    return value | nested if isinstance(nested, dict) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r:.80} occurs twice")
    return out


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class Fields:
    """Reads fields of a request and collects their problems."""

    def __init__(self, values: Mapping[str, Any], is_form: bool = False):
        """
        Args: is_form: numbers and flags are text, as a form has them.
        """
        self.values = {name: x for name, x in values.items() if x is not None}  # null: the default
        self.is_form, self.known, self.problems = is_form, set[str](), list[tuple[str, str]]()

    def problem(self, name: str, text: str) -> None:
        self.problems.append((name, text))

    def read(
        self,
        name: str,
        default: Any,
        is_valid: Callable[[Any], bool],
        expected: str,
        aliases: Sequence[str] = (),
        advice: str = "",
    ) -> Any:
        """The value of a field or of the first alias that is there."""
        self.known |= {name, *aliases}
        there = next((n for n in (name, *aliases) if n in self.values), None)
        if there is None:
            return default
        value = self.values[there]
        if is_valid(value):
            return value
        self.problem(
            there, f"expected {expected}; got {_shown(value)}" + (advice and f": {advice}")
        )
        return default

    def number(
        self, name: str, default: Any, low: Any, high: Any, *aliases: str, whole: bool = False
    ) -> Any:
        def is_valid(value: Any) -> bool:
            kinds = int if whole else (int, float)
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            return is_number and low <= value <= high  # NaN is not

        if self.is_form:
            for n in (name, *aliases):
                self._parse_number(n)
        kind = "a whole number" if whole else "a number"
        return self.read(name, default, is_valid, f"{kind} from {low} to {high}", aliases)

    def _parse_number(self, name: str) -> None:
        text = self.values.get(name)
        if isinstance(text, str) and re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?", text.strip()):
            self.values[name] = float(text) if "." in text else int(text)

    def numbers(
        self, name: str, default: Any, is_valid: Callable[[Any], bool], expected: str
    ) -> Any:
        """A list of numbers; a form has it as JSON, or as a field `name[]` for each of them."""
        if not self.is_form:
            return self.read(name, default, is_valid, expected)
        for n in (name, f"{name}[]"):
            value = self.values.get(n)
            text = f"[{','.join(value)}]" if isinstance(value, list) else value
            if isinstance(text, str):
                with contextlib.suppress(ValueError, RecursionError):
                    self.values[n] = json.loads(text)
        return self.read(name, default, is_valid, expected, (f"{name}[]",))

    def flag(self, name: str) -> bool:
        if self.is_form and self.values.get(name) in ("true", "false"):
            self.values[name] = self.values[name] == "true"
        return self.read(name, False, lambda x: isinstance(x, bool), "true or false")

    def choice(self, name: str, *allowed: str, advice: str = "") -> str:
        """One of `allowed`; the first is the default."""
        expected = " or ".join(repr(x) for x in allowed)
        is_valid = lambda x: isinstance(x, str) and x in allowed  # noqa: E731
        return self.read(name, allowed[0], is_valid, expected, advice=advice)

    def refuse(self, name: str, is_harmless: Callable[[Any], bool], advice: str) -> None:
        """A field of OpenAI's API, or of others, that only a harmless value may have."""
        self.read(name, None, is_harmless, "no such field", advice=advice)

    def finish(self) -> tuple[str, ...]:
        """The names of unknown fields.

        Raises: RequestError with every problem.
        """
        if self.problems:
            text = "; ".join(f"{name}: {problem}" for name, problem in self.problems)
            raise RequestError(text, param=self.problems[0][0], code="invalid_value")
        return tuple(sorted(name for name in self.values if name not in self.known))


def generation(
    body: Mapping[str, Any], model: ServedModel, limits: Limits, client: str
) -> ImageCall:
    """The request of POST /v1/images/generations.

    Raises: RequestError.
    """
    _require(model, model.engine.generates, "generating images")
    fields = Fields(body)
    values = _image_fields(fields, model, limits)
    return _image_call(fields.finish(), values, limits, client)


def edit(
    form: Mapping[str, Any],
    images: Sequence[bytes],
    masks: Sequence[bytes],
    model: ServedModel,
    limits: Limits,
    client: str,
) -> ImageCall:
    """The request of POST /v1/images/edits.

    Args:
      form: text fields; those whose names end with `[]` are lists of texts.
      images: files of the fields `image` and `image[]`.
      masks: files of the field `mask`.
    Raises: RequestError.
    """
    _require(model, model.engine.generates, "editing images")
    fields = Fields(form, is_form=True)
    values = _image_fields(fields, model, limits)
    # A mask says itself what may change; without one, the image is what the answer should resemble.
    strength = fields.number("strength", 1.0 if masks else 0.6, 0, 1)
    fields.choice("input_fidelity", "low", advice="use strength")
    for name, files, most in (("image", images, 1), ("mask", masks, 1)):
        if len(files) > most or (name == "image" and not files):
            fields.problem(name, f"expected one file; got {len(files)}")
    ignored = fields.finish()
    pixels = _decoded(images[0], limits, "image")
    size, mask = model.engine.image_size, None
    if masks:
        try:
            mask = images_lib.read_mask(_decoded(masks[0], limits, "mask"), pixels.shape[:2], size)
        except DataError as error:
            raise RequestError(str(error), param="mask", code="invalid_image") from error
    start = {
        "image": images_lib.for_generation(pixels, size),
        "strength": float(strength),
        "mask": mask,
    }
    return _image_call(ignored, values, limits, client, **start)


def _require(model: ServedModel, holds: bool, what: str) -> None:
    if not holds:
        raise RequestError(f"model: expected one for {what}; {model.name!r} lacks parts of it")


def _image_fields(fields: Fields, model: ServedModel, limits: Limits) -> dict[str, Any]:
    """The values that both kinds of requests for images have."""
    _model_field(fields, model)
    native = model.engine.image_size
    steps, scale = model.engine.student.defaults
    n = fields.number("n", 1, 1, limits.n, whole=True)
    values: dict[str, Any] = {
        "prompt": _prompt(fields, limits),
        "n": n,
        "side": _size(fields, native, limits),
        "seed": fields.number(
            "seed",
            secrets.randbelow(inputs.SEED_LIMIT - n),
            0,
            inputs.SEED_LIMIT - n,
            whole=True,
        ),
        "sampler": _sampler(fields, limits, steps),
        "guidance_scale": fields.number(
            "guidance_scale",
            min(scale, limits.guidance_scale),
            1,
            limits.guidance_scale,
            "guidance",
            "cfg_weight",
        ),
        "format": fields.choice("output_format", *image_files.FORMATS),
        "quality": fields.number("output_compression", 90, 0, 100, whole=True),
        "stream": fields.flag("stream"),
        "partial_images": fields.number("partial_images", 0, 0, limits.partial_images, whole=True),
    }
    if values["partial_images"] and not values["stream"]:
        fields.problem("partial_images", "expected with stream: true; got it without")
    order, student = values["sampler"].order, model.engine.student
    refused = inputs.student_problems(student, order, values["guidance_scale"])
    for name, problem in refused.items():
        fields.problem(name, problem)
    fields.choice("response_format", "b64_json", advice="this server stores no images")
    fields.choice("background", "auto", "opaque", advice="images have no transparency")
    fields.choice("quality", "auto", "standard", advice="use num_inference_steps")
    fields.choice("style", "vivid", advice="say it in the prompt")
    empty = lambda x: isinstance(x, str) and not x.strip()  # noqa: E731
    fields.refuse("negative_prompt", empty, "the model knows none; say in the prompt what to show")
    return values


def _image_call(
    ignored: tuple[str, ...], values: Mapping[str, Any], limits: Limits, client: str, **start: Any
) -> ImageCall:
    request = ImageRequest(
        id=f"img-{uuid.uuid4().hex}",
        client=client,
        prompt=values["prompt"],
        seeds=tuple(range(values["seed"], values["seed"] + values["n"])),
        guidance_scale=float(values["guidance_scale"]),
        sampler=values["sampler"],
        previews=min(values["partial_images"], values["sampler"].steps - 1),
        deadline=time.monotonic() + limits.deadline_seconds,
        **start,
    )
    return ImageCall(
        request=request,
        format=values["format"],
        quality=max(1, values["quality"]),
        side=values["side"],
        stream=values["stream"],
        ignored=ignored,
    )


def _sampler(fields: Fields, limits: Limits, default_steps: int) -> SamplerConfig:
    """How the image's equation is solved; docs/sampling.md."""

    def is_interval(value: Any) -> bool:
        numbers = isinstance(value, list) and [type(x) in (int, float) for x in value] == [True] * 2
        return numbers and 0 <= value[0] <= value[1] <= 1

    default_steps = min(default_steps, limits.steps)
    steps = fields.number(
        "num_inference_steps", default_steps, 1, limits.steps, "steps", "step", whole=True
    )
    order = fields.number("order", 1, 1, 2, whole=True)
    shift = fields.number("shift", 1.0, 0.01, 100)
    interval = fields.numbers(
        "guidance_interval", [0, 1], is_interval, "a list of two times from 0 to 1, in order"
    )
    begin, end = map(float, interval)
    return SamplerConfig(
        steps=steps, order=order, shift=float(shift), guide_from=begin, guide_until=end
    )


def _model_field(fields: Fields, model: ServedModel) -> None:
    name = fields.read("model", model.name, lambda x: isinstance(x, str), "a model's name")
    if name != model.name:
        raise RequestError(
            f"model: expected {model.name!r}, the only one here; got {_shown(name)}",
            404,
            param="model",
            code="model_not_found",
        )


def _prompt(fields: Fields, limits: Limits) -> str:
    def is_valid(value: Any) -> bool:
        return _is_text(value) and 0 < len(value.strip()) and len(value) <= limits.prompt_chars

    if "prompt" not in fields.values:
        fields.problem("prompt", "expected text; got none")
    return fields.read("prompt", "", is_valid, f"text of 1 to {limits.prompt_chars} characters")


def _size(fields: Fields, native: int, limits: Limits) -> int:
    """The side of the answered images; a size other than the model's is resized to."""

    def is_valid(value: Any) -> bool:
        match = re.fullmatch(r"([1-9]\d{0,4})x\1", value) if isinstance(value, str) else None
        return value == "auto" or bool(
            match and (int(match[1]) == native or MIN_SIDE <= int(match[1]) <= limits.size)
        )

    expected = (
        f"'auto', '{native}x{native}', or a square of {MIN_SIDE}x{MIN_SIDE} to "
        f"{limits.size}x{limits.size}, which is resized to"
    )
    size = fields.read("size", "auto", is_valid, expected)
    return native if size == "auto" else int(size.split("x")[0])


def _decoded(data: bytes, limits: Limits, param: str) -> np.ndarray:
    """The pixels of an image file. Nothing large is decoded."""
    try:
        return images_lib.decode(data, limits.image_megapixels * 10**6, limits.image_mib * MIB)
    except DataError as error:
        raise RequestError(f"{param}: {error}", param=param, code="invalid_image") from error


def chat(body: Mapping[str, Any], model: ServedModel, limits: Limits, client: str) -> ChatCall:
    """The request of POST /v1/chat/completions.

    Raises: RequestError.
    """
    _require(model, model.engine.chats, "conversations")
    fields = Fields(body)
    _model_field(fields, model)
    most = 2**31 - 1  # the context ends an answer earlier
    values: dict[str, Any] = {
        "max_tokens": fields.number(
            "max_completion_tokens", DEFAULT_TOKENS, 1, most, "max_tokens", whole=True
        ),
        "temperature": float(fields.number("temperature", 0.0, 0, 2)),
        "top_p": float(fields.number("top_p", 1.0, 1e-6, 1)),
        "seed": fields.number(
            "seed", secrets.randbelow(inputs.SEED_LIMIT), 0, inputs.SEED_LIMIT - 1, whole=True
        ),
        "stop": _stop(fields),
    }
    stream = fields.flag("stream")
    usage = fields.read(
        "stream_options",
        {},
        lambda x: isinstance(x, dict) and isinstance(x.get("include_usage", False), bool),
        "an object with include_usage: true or false",
    )
    _refuse_of_chat(fields)
    turns, urls = _turns(fields)
    ignored = fields.finish()
    _check_length(turns, model)
    images = _images_of_chat(urls, model, limits)
    request = ChatRequest(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        client=client,
        messages=turns,
        images=images,
        deadline=time.monotonic() + limits.deadline_seconds,
        **values,
    )
    return ChatCall(
        request=request,
        stream=stream,
        include_usage=bool(usage.get("include_usage")),
        created=int(time.time()),
        ignored=ignored,
    )


def _stop(fields: Fields) -> tuple[str, ...]:
    def is_valid(value: Any) -> bool:
        many = [value] if isinstance(value, str) else value
        return (
            isinstance(many, list)
            and len(many) <= 4
            and all(_is_text(x) and 0 < len(x) <= STOP_CHARS for x in many)
        )

    expected = f"a text of 1 to {STOP_CHARS} characters or a list of at most 4"
    stop = fields.read("stop", [], is_valid, expected)
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _refuse_of_chat(fields: Fields) -> None:
    """What this server cannot do; the harmless values are those that clients send by default."""
    falsy = lambda x: not x  # noqa: E731
    fields.refuse("n", lambda x: x == 1 and not isinstance(x, bool), "ask once for each answer")
    for name in ("tools", "functions", "logit_bias", "audio"):
        fields.refuse(name, falsy, "leave it out: this model cannot do that")
    for name in ("logprobs", "top_logprobs", "frequency_penalty", "presence_penalty"):
        fields.refuse(name, falsy, "leave it out: this server does not have it")
    fields.refuse("modalities", lambda x: x == ["text"], "use /v1/images/generations for images")
    fields.refuse("response_format", lambda x: x == {"type": "text"}, "answers are text")


def _turns(fields: Fields) -> tuple[list[dict[str, Any]], list[Any]]:
    fields.known.add("messages")
    try:
        return chat_format.parse_messages(fields.values.get("messages"))
    except DataError as error:
        fields.problem("messages", str(error).removeprefix("messages: "))
        return [], []


def _check_length(turns: Sequence[Mapping[str, Any]], model: ServedModel) -> None:
    """Raises RequestError for text that cannot fit the context, before it is tokenized."""
    most = CHARS_A_POSITION * model.engine.context
    length = sum(len(text) for turn in turns for text in (turn["role"], *turn["content"]))
    if length > most:
        raise RequestError(
            f"messages: expected at most {most} characters of roles and text, because the context "
            f"has {model.engine.context} positions; got {length}: shorten them",
            param="messages",
            code="context_length_exceeded",
        )


def _images_of_chat(
    urls: Sequence[Any], model: ServedModel, limits: Limits
) -> tuple[np.ndarray, ...]:
    """The images of a conversation in the model's size: large ones are not kept."""
    if urls:
        _require(model, model.engine.understands, "images in conversations")
    most = min(limits.images, model.engine.images_per_chat)
    if len(urls) > most:
        raise RequestError(
            f"messages: expected at most {most} images; got {len(urls)}",
            param="messages",
            code="too_many_images",
        )
    images = []
    for i, url in enumerate(urls):
        if not isinstance(url, str) or not url.startswith("data:image/"):
            raise RequestError(
                f"messages: image {i}: expected a data:image/... URL; got another: send the image "
                "itself, because this server fetches and reads nothing",
                param="messages",
                code="image_url_not_allowed",
            )
        try:
            data = images_lib.data_url_bytes(url)
        except DataError as error:
            raise RequestError(
                f"messages: image {i}: {error}", param="messages", code="invalid_image"
            ) from error
        pixels = _decoded(data, limits, "messages")
        images.append(images_lib.for_understanding(pixels, model.engine.image_size))
    return tuple(images)


def _is_text(value: Any) -> bool:
    """Whether a value is text of Unicode characters, without half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """A value in an error message, shortened; never raises."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
