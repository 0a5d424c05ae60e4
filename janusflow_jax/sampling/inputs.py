"""Requests of callers -> arrays of few shapes: conversations, seeds, prompts in buckets.

Every shape is rounded up: rows and images to powers of two, prompts to a few lengths. So a new
prompt seldom compiles anything. What is added is masked.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from janusflow_jax.config import SamplerConfig, StudentConfig
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format
from janusflow_jax.sampling import flow

Turns = list[dict[str, Any]]
OUTPUTS = ("pil", "numpy", "latent", "trajectory")
PROMPT_BUCKET = 32
SEED_LIMIT = 2**32
FLOAT_MAX, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
"""The programs compute in float32."""
_ROLES = ("system", "user", "assistant")


def check_generate(
    prompts: Sequence[Any],
    per_prompt: Any,
    output: str = "pil",
    guidance_scale: Any = None,
    num_steps: Any = None,
    order: Any = 1,
    shift: Any = 1.0,
    guidance_interval: Any = (0.0, 1.0),
    student: StudentConfig = StudentConfig(),  # noqa: B008 - never changed
) -> tuple[SamplerConfig, float]:
    """The solver of a request for images, and its guidance scale.

    Args:
      guidance_scale, num_steps: None: those of the model.
      student: of the model.
    Raises: JanusFlowError with every problem of the request.
    """
    steps, scale = student.defaults
    num_steps = steps if num_steps is None else num_steps
    guidance_scale = scale if guidance_scale is None else guidance_scale
    problems = [] if prompts else ["no prompt"]
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and not prompt.strip():
            problems.append(f"prompt {i} is empty")
        else:
            problems += _text_problems(f"prompt {i}", prompt)
    problems += _count_problems("num_steps", num_steps)
    problems += _count_problems("images_per_prompt", per_prompt)
    problems += _number_problems("guidance_scale", guidance_scale, "a finite number", -FLOAT_MAX)
    problems += [] if output in OUTPUTS else [f"output: expected one of {OUTPUTS}; got {output!r}"]
    problems += [] if _integer(order) in (1, 2) else [f"order: expected 1 or 2; got {order!r}"]
    problems += _number_problems("shift", shift, "a finite number > 0", TINY)
    interval: tuple[Any, ...] = tuple(guidance_interval) if np.iterable(guidance_interval) else ()
    if len(interval) != 2 or any(_number_problems("", x, "", 0.0, 1.0) for x in interval):
        expected = "two times from 0 to 1"
        problems.append(f"guidance_interval: expected {expected}; got {guidance_interval!r}")
    elif interval[0] > interval[1]:
        problems.append(f"guidance_interval: expected its end after its begin; got {interval}")
    refused = student_problems(student, order, guidance_scale)
    problems += [f"{name}: {problem}" for name, problem in refused.items()]
    if problems:
        raise JanusFlowError("generate: " + "; ".join(problems))
    sampler = SamplerConfig(
        steps=int(num_steps),
        order=int(order),
        shift=float(shift),
        guide_from=float(interval[0]),
        guide_until=float(interval[1]),
    )
    return sampler, float(guidance_scale)


def student_problems(student: StudentConfig, order: Any, guidance_scale: Any) -> dict[str, str]:
    """What a student cannot do: option -> problem. Empty for another model."""
    problems = {}
    if student.steps and order == 2:
        problems["order"] = "expected 1, because a student's steps are no velocities; got 2"
    if student.steps and guidance_scale != 1:
        problems["guidance_scale"] = (
            f"expected 1, because the student has learned that of its teacher "
            f"({student.guidance_scale:g}); got {guidance_scale!r}"
        )
    return problems


def check_best_of(best_of: Any, output: str) -> None:
    """Raises JanusFlowError unless images can be chosen."""
    if problems := _count_problems("best_of", best_of):
        raise JanusFlowError("generate: " + problems[0])
    if best_of > 1 and output == "trajectory":
        raise JanusFlowError(
            f"generate: best_of: expected 1 for output 'trajectory'; got {best_of}: choose first"
        )


def check_edit(
    what: str,
    prompts: Sequence[Any],
    strength: Any,
    output: str,
    student: StudentConfig,
    **solver: Any,
) -> tuple[SamplerConfig, float, int]:
    """The solver of a request to change images, its guidance scale and first step.

    Raises: JanusFlowError with a problem of the request.
    """
    if problems := _number_problems("strength", strength, "a number from 0 to 1", 0.0, 1.0):
        raise JanusFlowError(f"{what}: {problems[0]}")
    if output == "trajectory":
        raise JanusFlowError(f"output: expected one of {OUTPUTS[:-1]}; got 'trajectory'")
    sampler, scale = check_generate(prompts, 1, output, student=student, **solver)
    return sampler, scale, flow.first_step(float(strength), sampler)


def pairs(what: str, items: Any, prompts: Any, name: str = "images") -> tuple[list[Any], list[str]]:
    """One item for each prompt, as lists; a single one of either may stand alone.

    Raises: JanusFlowError: their numbers differ.
    """
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(items) != len(prompts):
        raise JanusFlowError(
            f"{what}: expected one prompt for each of the {name}; got {len(items)} {name} and "
            f"{len(prompts)} prompts"
        )
    return items, prompts


def check_chat(
    max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any, count: int = 1
) -> None:
    """Raises JanusFlowError with every option of `count` conversations that is out of range."""
    problems = _count_problems("max_new_tokens", max_new_tokens)
    problems += _number_problems(
        "temperature", temperature, "a finite number >= 0 (0 is greedy)", 0.0
    )
    problems += _number_problems("top_p", top_p, "above 0 and at most 1", TINY, 1.0)
    problems += [] if _integer(seed) is not None else [f"seed: expected an integer; got {seed!r}"]
    if problems:
        raise JanusFlowError("chat: " + "; ".join(problems))
    image_seeds(seed, 1, count)


def _count_problems(name: str, value: Any) -> list[str]:
    number = _integer(value)
    return [] if number and number >= 1 else [f"{name}: expected an integer >= 1; got {value!r}"]


def _number_problems(
    name: str, value: Any, expected: str, low: float, high: float = FLOAT_MAX
) -> list[str]:
    try:
        ok = not isinstance(value, str) and low <= float(value) <= high  # NaN is not
    except (TypeError, ValueError, OverflowError):
        ok = False
    return [] if ok else [f"{name}: expected {expected}; got {value!r}"]


def _text_problems(name: str, text: Any) -> list[str]:
    if not isinstance(text, str):
        return [f"{name}: expected text; got {type(text).__name__}"]
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8
        return [f"{name}: expected Unicode text; got {text[error.start]!r} at {error.start}"]
    return []


def _integer(value: Any) -> int | None:
    """An integer of Python, NumPy or JAX as an int; None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def image_seeds(seed: Any, num_prompts: int, per_prompt: int) -> list[int]:
    """The seed of every image of the output.

    Args:
      seed: image n gets seed + n. A list: image j of prompt i gets seed[i] + j.
    Raises:
      JanusFlowError: the number of seeds is not that of the prompts, or one is not an integer or
        out of range.
    """
    if (first := _integer(seed)) is not None:
        seeds = [first + n for n in range(num_prompts * per_prompt)]
    else:
        firsts: list[Any] = [_integer(s) for s in seed] if np.iterable(seed) else [None]
        if None in firsts:
            raise JanusFlowError(f"seed: expected an integer, or one for each prompt; got {seed!r}")
        if len(firsts) != num_prompts:
            raise JanusFlowError(
                f"seed: expected one or {num_prompts} (one a prompt); got {len(firsts)}"
            )
        seeds = [s + j for s in firsts for j in range(per_prompt)]
    if seeds and not 0 <= min(seeds) <= max(seeds) < SEED_LIMIT:
        last = f" to {max(seeds)}" if len(seeds) > 1 else ""
        raise JanusFlowError(f"seed: expected 0 to 2**32 - 1; got {min(seeds)}{last}")
    return seeds


def generator_seeds(generator: Any, count: int) -> list[int]:
    """The seeds of `count` images from what diffusers calls a generator.

    Args:
      generator: the first seed, or one for each image; seeds, or objects with `initial_seed()`.
        None: a random seed.
    Raises:
      JanusFlowError: as `image_seeds`.
    """
    if generator is None:
        generator = secrets.randbelow(SEED_LIMIT - count)
    own = lambda x: x.initial_seed() % SEED_LIMIT if hasattr(x, "initial_seed") else x  # noqa: E731
    if isinstance(generator, (list, tuple)):
        return image_seeds([own(x) for x in generator], count, 1)
    return image_seeds(own(generator), count, 1)


def conversations(
    conversation: Any, images: Any, tag: str
) -> tuple[list[Turns], list[list[Any]], bool]:
    """Brings the arguments of `Pipeline.chat` into one form.

    Args:
      conversation: a question, turns {'role', 'content', 'images'}, or a list of those.
      images: a list; for a list of conversations, a list of lists. Empty if the turns hold them.
      tag: marks an image in a text. A question without tags gets them in front.
    Returns:
      turns and images of every conversation; whether there was a single one.
    Raises:
      JanusFlowError: lists that do not match, or malformed turns.
    """
    if not isinstance(conversation, (str, list, tuple)) or conversation in ([], ()):
        raise JanusFlowError(
            "chat: expected a question, a list of turns, or a list of questions or of such lists; "
            f"got {conversation!r:.80}"
        )
    single = isinstance(conversation, str) or all(isinstance(turn, dict) for turn in conversation)
    many: Any = [conversation] if single else conversation
    if single:
        images = [_listed(images)]
    elif not isinstance(images, (list, tuple)) or not all(
        isinstance(x, (list, tuple)) for x in images
    ):
        raise JanusFlowError(
            "chat: expected a list of images for each conversation, [[...], ...]; got "
            f"{images!r:.80}"
        )
    else:
        images = [list(x) for x in images] or [[] for _ in many]
    if len(images) != len(many):
        raise JanusFlowError(
            f"chat: expected one list of images a conversation; got {len(many)} conversations "
            f"and {len(images)} lists"
        )
    pairs = [_turns(x, own, tag) for x, own in zip(many, images, strict=True)]
    return [turns for turns, _ in pairs], [own for _, own in pairs], single


def _listed(images: Any) -> list[Any]:
    """Images as a caller may write them: a list, a single one, or None."""
    if isinstance(images, (list, tuple)):
        return list(images)
    return [] if images is None else [images]


def _turns(conversation: Any, images: list[Any], tag: str) -> tuple[Turns, list[Any]]:
    """The turns of one conversation with the tags of their images, and all of its images.

    A turn may hold its own images, as in the published code; then no others are given.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "User", "content": with_tags(conversation, len(images), tag)}]
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise JanusFlowError(
            f"chat: expected a question or a list of turns; got {conversation!r:.80}"
        )
    turns: Turns = []
    inside: list[Any] = []
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or turn.keys() - {"role", "content", "images"}:
            raise JanusFlowError(
                f"chat: turn {i}: expected {{'role', 'content', 'images'}} (images are optional); "
                f"got {turn if not isinstance(turn, dict) else list(turn)!r:.80}"
            )
        role, content, own = turn.get("role"), turn.get("content"), _listed(turn.get("images"))
        if isinstance(content, (list, tuple)):
            if own:
                raise JanusFlowError(
                    f"chat: turn {i}: expected images either in its content or in 'images'; got "
                    "both: keep one"
                )
            try:
                content, own = chat_format.content_parts(content)
            except JanusFlowError as error:
                raise JanusFlowError(f"chat: turn {i}: {error}") from error
            if str(role).lower() not in _ROLES or (own and str(role).lower() != "user"):
                raise JanusFlowError(
                    f"chat: turn {i}: expected the role user, assistant or system, and images of "
                    f"a user only; got {role!r} with {len(own)} images"
                )
            turns.append({"role": str(role), "content": content})
            inside += own
            continue
        if str(role).lower() not in _ROLES or not isinstance(content, str):
            raise JanusFlowError(
                f"chat: turn {i}: expected {{'role': 'User' | 'Assistant', 'content': text}} (the "
                f"first may be System); got role {role!r}, content {content!r:.40}"
            )
        if problems := _text_problems(f"turn {i}", content):
            raise JanusFlowError("chat: " + problems[0])
        if own:
            content = with_tags(content, len(own), tag)
            if str(role).lower() != "user" or content.count(tag) != len(own):
                raise JanusFlowError(
                    f"chat: turn {i}: expected images in a User turn, and one {tag} in its text "
                    f"for each or none; got {role}, {len(own)} images, {content.count(tag)} tags"
                )
        turns.append({"role": str(role), "content": content})
        inside += own
    if inside and images:
        raise JanusFlowError(
            "chat: expected images either in the turns or beside them; got both: keep one"
        )
    return turns, inside or images


def with_tags(question: str, num_images: int, tag: str) -> str:
    """A question with the tags of its images in front, unless it places them itself.

    Raises: JanusFlowError: it places them by the tag of other models.
    """
    if tag in question:
        return question
    if num_images and "<image>" in question:
        raise JanusFlowError(
            f"chat: expected {tag} in the place of an image; got <image>, which is plain text: "
            "replace it"
        )
    return f"{tag}\n" * num_images + question


def split_system(turns: Turns) -> tuple[str, Turns]:
    """The system prompt and the other turns. A first System turn replaces the default prompt."""
    if turns and turns[0]["role"].lower() == "system":
        content = turns[0]["content"]
        return content if isinstance(content, str) else content[0], turns[1:]
    return chat_format.SYSTEM_PROMPT, turns


def before_eos(row: np.ndarray, eos_id: int) -> list[int]:
    """The ids before the first EOS."""
    end = np.flatnonzero(row == eos_id)
    return row[: end[0] if len(end) else len(row)].tolist()


def next_piece(text: str, sent: str, complete: bool) -> str:
    """What can be sent now of a growing text, of which `sent` has been.

    Spaces at its end may be stripped later, and half a character may become another, so they wait
    until the text is complete. Joined, the pieces are the text, stripped.
    """
    text = text.strip()
    if complete:
        return text[len(sent) :]
    text = text.rstrip("\ufffd").rstrip()
    return text[len(sent) :] if text.startswith(sent) else ""


def before_stop(text: str, stops: Sequence[str], complete: bool) -> tuple[str, bool]:
    """The text before the first of the stop strings, and whether there was one.

    An end that may become a stop string is left out until the text is complete.
    """
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        return text[: min(ends)], True
    if not complete:
        starts = (stop[:n] for stop in stops for n in range(1, min(len(stop), len(text) + 1)))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        text = text[: len(text) - held]
    return text, False


def length_bucket(length: int) -> int:
    """`length`, rounded up to 32s; above 256 to eighths of the next power of two."""
    step = max(PROMPT_BUCKET, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def batch_bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def batch_shape(ids: Sequence[Any]) -> tuple[int, int]:
    """Rows and positions of the batch that a program computes for these prompts."""
    return batch_bucket(len(ids)), length_bucket(max(map(len, ids)))


def pad(ids: Sequence[Any], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32[B, P] with P of `length_bucket`, and lengths int32[B]."""
    lengths = np.asarray([len(x) for x in ids], np.int32)
    tokens = np.full((len(ids), batch_shape(ids)[1]), pad_id, np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[: len(x)] = x
    return tokens, lengths


def fill(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size` rows."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) if len(x) < size else x
