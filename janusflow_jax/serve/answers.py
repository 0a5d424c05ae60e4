"""Events of the engine -> the JSON objects and server-sent events of OpenAI's API. Pure."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from janusflow_jax.data import image_files
from janusflow_jax.serve.checks import DEFAULT_TOKENS, ChatCall, ImageCall, ServedModel
from janusflow_jax.serve.limits import Limits, RequestError
from janusflow_jax.serve.requests import Failed, Finished, ImageDone, Preview

_STATUSES = {
    "cancelled": 499,
    "deadline": 503,
    "draining": 503,
    "engine_reset": 503,
    "not_finite": 500,
    "internal": 500,
}
RETRY_SECONDS = 5.0
DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """ASCII: half a surrogate pair in a client's field name stays harmless."""
    return json.dumps(value, allow_nan=False).encode()


def server_sent(value: Mapping[str, Any]) -> bytes:
    """One event, under the name of its type if it has one."""
    name = f"event: {value['type']}\n".encode() if "type" in value else b""
    return name + b"data: " + dumps(value) + b"\n\n"


def comment(text: str) -> bytes:
    """What clients skip; it keeps a connection open."""
    return f": {text}\n\n".encode()


def failure(failed: Failed) -> RequestError:
    status = _STATUSES.get(failed.code, 500)
    again = RETRY_SECONDS if status == 503 else 0.0
    return RequestError(failed.message, status, code=failed.code, retry_after=again)


def models(model: ServedModel, limits: Limits) -> dict[str, Any]:
    """GET /v1/models."""
    return {"object": "list", "data": [describe(model, limits)]}


def describe(model: ServedModel, limits: Limits) -> dict[str, Any]:
    """GET /v1/models/{id}. `janusflow` is ours: what the model can do, and what may be asked."""
    engine = model.engine
    steps, scale = engine.student.defaults
    about = {
        "name": model.name,
        "image_size": engine.image_size,
        "generates": engine.generates,
        "understands": engine.understands,
        "chats": engine.chats,
        "defaults": {
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "max_tokens": DEFAULT_TOKENS,
        },
        "limits": {
            "prompt_chars": limits.prompt_chars,
            "prompt_tokens": engine.prompt_tokens,
            "n": limits.n,
            "num_inference_steps": limits.steps,
            "guidance_scale": 1.0 if engine.student.steps else limits.guidance_scale,
            "partial_images": limits.partial_images,
            "size": limits.size,
            "images": min(limits.images, engine.images_per_chat),
            "max_tokens": engine.context,
            "body_bytes": limits.body_mib * 2**20,
            "image_bytes": limits.image_mib * 2**20,
            "image_pixels": limits.image_megapixels * 10**6,
            "deadline_seconds": limits.deadline_seconds,
        },
        "sha256": model.sha256,
        "system_fingerprint": model.fingerprint,
        **model.facts,
    }
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "janusflow_jax",
        "janusflow": about,
    }


def image_base64(
    image: UInt8[np.ndarray, "H W 3"], seed: int, call: ImageCall, model: ServedModel
) -> str:
    """The file of one image, of the size and format that were asked for."""
    pixels = Image.fromarray(image)
    if pixels.width != call.side:
        pixels = pixels.resize((call.side, call.side), Image.Resampling.LANCZOS)
    request = call.request
    settings = image_files.settings(
        prompt=request.prompt,
        seed=seed,
        sampler=request.sampler,
        guidance_scale=request.guidance_scale,
        model=model.name,
        model_sha256=model.sha256,
    )
    if request.image is not None:
        settings |= {"method": method(call), "strength": request.strength}
    data = image_files.encode(pixels, settings, call.format, call.quality)
    return base64.b64encode(data).decode()


def method(call: ImageCall) -> str:
    """How the images came about. The model was not trained to edit."""
    if call.request.mask is not None:
        return "flow_inpaint"
    return "text_to_image" if call.request.image is None else "flow_image_to_image"


def _about_image(call: ImageCall, model: ServedModel) -> dict[str, Any]:
    native = model.engine.image_size
    return {
        "size": f"{call.side}x{call.side}",
        "native_size": f"{native}x{native}",
        "output_format": call.format,
        "quality": "auto",
        "background": "opaque",
        "method": method(call),
        "system_fingerprint": model.fingerprint,
    }


def image_usage(finished: Finished) -> dict[str, Any]:
    """Positions of the prompt and of the generated images."""
    return {
        "input_tokens": finished.prompt_tokens,
        "output_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "input_tokens_details": {"text_tokens": finished.prompt_tokens, "image_tokens": 0},
    }


def images(
    call: ImageCall, model: ServedModel, encoded: Sequence[str], finished: Finished
) -> dict[str, Any]:
    """The answer with all images of a request, in the order of their seeds."""
    items = [
        {
            "b64_json": data,
            "seed": seed,
            "revised_prompt": None,
            "mime_type": image_files.FORMATS[call.format],
        }
        for data, seed in zip(encoded, call.request.seeds, strict=True)
    ]
    return {
        "created": int(time.time()),
        "data": items,
        "usage": image_usage(finished),
        **_about_image(call, model),
        "ignored": call.ignored,
    }


def partial_image(
    call: ImageCall, model: ServedModel, event: Preview, number: int, encoded: str
) -> dict[str, Any]:
    """The event with an estimate of an image; `number` counts those of this image from 0."""
    return _image_event(call, model, "partial_image", event.index, encoded) | {
        "partial_image_index": number,
        "step": event.step,
    }


def completed_image(
    call: ImageCall,
    model: ServedModel,
    event: ImageDone,
    encoded: str,
    finished: Finished | None = None,
) -> dict[str, Any]:
    """The event with a finished image; the last one of a request has the usage of all."""
    usage = {"usage": finished and image_usage(finished)}
    return _image_event(call, model, "completed", event.index, encoded) | usage


def _image_event(
    call: ImageCall, model: ServedModel, kind: str, index: int, encoded: str
) -> dict[str, Any]:
    family = "image_generation" if call.request.image is None else "image_edit"
    return {
        "type": f"{family}.{kind}",
        "b64_json": encoded,
        "created_at": int(time.time()),
        "image_index": index,
        "seed": call.request.seeds[index],
        **_about_image(call, model),
    }


def chat(call: ChatCall, model: ServedModel, text: str, finished: Finished) -> dict[str, Any]:
    """The whole answer of a conversation."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "finish_reason": finished.reason,
        "logprobs": None,
    }
    return {
        **_about_chat(call, model, "chat.completion"),
        "choices": [choice],
        "usage": chat_usage(finished),
        "seed": call.request.seed,
        "ignored": call.ignored,
    }


def chat_chunk(
    call: ChatCall, model: ServedModel, delta: Mapping[str, Any], reason: str | None = None
) -> dict[str, Any]:
    """One piece of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return {**_about_chat(call, model, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(call: ChatCall, model: ServedModel, finished: Finished) -> dict[str, Any]:
    """The last chunk of a stream that asked for usage."""
    about = _about_chat(call, model, "chat.completion.chunk")
    return {**about, "choices": [], "usage": chat_usage(finished)}


def _about_chat(call: ChatCall, model: ServedModel, kind: str) -> dict[str, Any]:
    return {
        "id": call.request.id,
        "object": kind,
        "created": call.created,
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


def chat_usage(finished: Finished) -> dict[str, int]:
    """Positions of images count as tokens."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
