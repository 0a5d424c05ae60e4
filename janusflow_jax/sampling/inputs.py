"""Requests of callers -> arrays of few shapes: conversations, seeds, prompts in buckets.

Every shape is rounded up: rows and images to powers of two, prompts to a few lengths. So a new
prompt seldom compiles anything. What is added is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format

Turns = list[dict[str, str]]
OUTPUTS = ("pil", "numpy", "latent", "trajectory")
PROMPT_BUCKET = 32
SEED_LIMIT = 2**32
_ROLES = ("system", "user", "assistant")


def check_generate(prompts: Sequence[Any], num_steps: int, per_prompt: int, output: str) -> None:
    """Raises JanusFlowError with every problem of a request for images."""
    problems = [] if prompts else ["no prompt"]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            problems.append(f"prompt {i}: expected text; got {type(prompt).__name__}")
        elif not prompt.strip():
            problems.append(f"prompt {i} is empty")
    problems += [] if num_steps >= 1 else [f"num_steps: expected >= 1; got {num_steps}"]
    problems += [] if per_prompt >= 1 else [f"images_per_prompt: expected >= 1; got {per_prompt}"]
    problems += [] if output in OUTPUTS else [f"output: expected one of {OUTPUTS}; got {output!r}"]
    if problems:
        raise JanusFlowError("generate: " + "; ".join(problems))


def check_chat(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises JanusFlowError with every option that is out of range."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: expected >= 1; got {max_new_tokens}")
    if not temperature >= 0:
        problems.append(f"temperature: expected >= 0 (0 is greedy); got {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p: expected above 0 and at most 1; got {top_p}")
    if problems:
        raise JanusFlowError("chat: " + "; ".join(problems))


def image_seeds(seed: int | Sequence[int], num_prompts: int, per_prompt: int) -> list[int]:
    """The seed of every image of the output.

    Args:
      seed: image n gets seed + n. A list: image j of prompt i gets seed[i] + j.
    Raises:
      JanusFlowError: the number of seeds is not that of the prompts, or one is out of range.
    """
    if isinstance(seed, (int, np.integer)):
        seeds = [int(seed) + n for n in range(num_prompts * per_prompt)]
    elif len(seed) != num_prompts:
        raise JanusFlowError(f"seed: expected one or {num_prompts} (one a prompt); got {len(seed)}")
    else:
        seeds = [int(s) + j for s in seed for j in range(per_prompt)]
    if seeds and not 0 <= min(seeds) <= max(seeds) < SEED_LIMIT:
        raise JanusFlowError(f"seed: expected 0 to 2**32 - 1; got {min(seeds)}..{max(seeds)}")
    return seeds


def conversations(
    conversation: Any, images: Any, tag: str
) -> tuple[list[Turns], list[list[Any]], bool]:
    """Brings the arguments of `Pipeline.chat` into one form.

    Args:
      conversation: a question, turns {'role', 'content'}, or a list of those.
      images: a list; for a list of conversations, a list of lists.
      tag: marks an image in a text. A question without tags gets them in front.
    Returns:
      turns and images of every conversation; whether there was a single one.
    Raises:
      JanusFlowError: lists that do not match, or malformed turns.
    """
    single = isinstance(conversation, str) or (
        isinstance(conversation, (list, tuple))
        and len(conversation) > 0
        and all(isinstance(turn, dict) for turn in conversation)
    )
    many = [conversation] if single else list(conversation)
    if single:
        images = [list(images) if isinstance(images, (list, tuple)) else [images]]
    elif not all(isinstance(x, (list, tuple)) for x in images):
        raise JanusFlowError(
            "chat: expected a list of images for each conversation, [[...], ...]; got "
            f"{[type(x).__name__ for x in images]}"
        )
    else:
        images = [list(x) for x in images] or [[] for _ in many]
    if not many or len(images) != len(many):
        raise JanusFlowError(
            f"chat: expected one list of images a conversation; got {len(many)} conversations "
            f"and {len(images)} lists"
        )
    turns = [_turns(x, len(own), tag) for x, own in zip(many, images, strict=True)]
    return turns, images, single


def _turns(conversation: Any, num_images: int, tag: str) -> Turns:
    if isinstance(conversation, str):
        return [{"role": "User", "content": with_tags(conversation, num_images, tag)}]
    for i, turn in enumerate(conversation):
        role, content = (turn.get(k) for k in ("role", "content"))
        if str(role).lower() not in _ROLES or not isinstance(content, str):
            raise JanusFlowError(
                f"chat: turn {i}: expected {{'role': 'User' | 'Assistant', 'content': text}} (the "
                f"first may be System); got role {role!r}, content {content!r:.40}"
            )
    return list(conversation)


def with_tags(question: str, num_images: int, tag: str) -> str:
    """A question with the tags of its images in front, unless it places them itself."""
    return question if tag in question else f"{tag}\n" * num_images + question


def split_system(turns: Turns) -> tuple[str, Turns]:
    """The system prompt and the other turns. A first System turn replaces the default prompt."""
    if turns and turns[0]["role"].lower() == "system":
        return turns[0]["content"], turns[1:]
    return chat_format.SYSTEM_PROMPT, turns


def before_eos(row: np.ndarray, eos_id: int) -> list[int]:
    """The ids before the first EOS."""
    end = np.flatnonzero(row == eos_id)
    return row[: end[0] if len(end) else len(row)].tolist()


def length_bucket(length: int) -> int:
    """`length`, rounded up to 32s; above 256 to eighths of the next power of two."""
    step = max(PROMPT_BUCKET, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def batch_bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def pad(ids: Sequence[Any], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32[B, P] with P of `length_bucket`, and lengths int32[B]."""
    lengths = np.asarray([len(x) for x in ids], np.int32)
    tokens = np.full((len(ids), length_bucket(int(lengths.max()))), pad_id, np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[: len(x)] = x
    return tokens, lengths


def fill(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size` rows."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) if len(x) < size else x
