"""Texts and conversations as people have them -> ours, or the reason why not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from janusflow_jax.data.prepare.raw import Options, Skipped

USER = ("user", "human", "prompter")
ASSISTANT = ("assistant", "gpt", "chatgpt", "bot", "model")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(value: Any, what: str, max_chars: int) -> str:
    """The text, stripped, with \\n at line ends.

    Args:
      value: str, or UTF-8 bytes (a byte order mark is dropped).
      what: names it in reasons: caption, turn, text.
      max_chars: more is refused.
    Raises:
      Skipped: nothing there, no text, not UTF-8, control characters, too long.
    """
    if value is None:
        raise Skipped(f"{what}: missing")
    if isinstance(value, bytes):
        if len(value) > 4 * max_chars:  # perhaps cut within a character
            raise Skipped(f"{what}: too long", f"more than {4 * max_chars:,} bytes")
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as e:
            at = f"byte {e.start}: {value[e.start : e.start + 8]!r}"
            raise Skipped(f"{what}: not UTF-8", at) from e
    if not isinstance(value, str):
        raise Skipped(f"{what}: not text", f"{type(value).__name__} {str(value)[:40]}")
    if found := _SURROGATE.search(value):
        raise Skipped(f"{what}: not UTF-8", f"half a character at {found.start()}")
    text = value.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\x0b", "\n").replace("\x0c", "\n").strip()  # page breaks
    if not any(c.isprintable() and not c.isspace() for c in text[:1000]):
        if not any(c.isprintable() and not c.isspace() for c in text):
            raise Skipped(f"{what}: empty")
    if found := _CONTROL.search(text):
        raise Skipped(f"{what}: control characters", f"{found[0]!r} at {found.start()}")
    if len(text) > max_chars:
        raise Skipped(f"{what}: too long", f"{len(text):,} characters, at most {max_chars:,}")
    return text


def captions(value: Any, max_chars: int) -> tuple[list[str], list[Skipped]]:
    """(captions that can be used, those of several that were dropped).

    Raises:
      Skipped: none can be used; the reason is the first one's.
    """
    many = isinstance(value, (list, tuple))
    if many and not value:
        raise Skipped("caption: missing")
    good, dropped = [], []
    for one in value if many else [value]:
        try:
            good.append(clean(one, "caption", max_chars))
        except Skipped as e:
            dropped.append(e)
    if not good:
        raise dropped[0]
    return list(dict.fromkeys(good)), dropped


def document(value: Any, num_images: int, options: Options) -> str:
    """A text in which a tag marks each picture.

    Raises:
      Skipped: it is no text, or another number of markers than of pictures.
    """
    text = clean(value, "text", options.max_document)
    text = mark(text, options)
    _check_count(text.count(options.image_tag), num_images)
    return text


def mark(text: str, options: Options) -> str:
    """The source's picture markers as our tag.

    Raises:
      Skipped: our tag stands in the text as words: it would be taken for a picture.
    """
    if options.image_marker != options.image_tag and options.image_tag in text:
        raise Skipped(
            "text: holds the image tag",
            f"{options.image_tag}, which would stand for a picture (--image-marker, if it does)",
        )
    return text.replace(options.image_marker, options.image_tag)


def conversation(value: Any, num_images: int, options: Options) -> list[dict[str, str]]:
    """Turns {role, content}: user and assistant in turn, after a system turn where there is one.

    A question behind the last answer is dropped: it teaches nothing.

    Args:
      value: turns {from, value}, {role, content} (content: text, or parts of text and pictures) or
        {user, assistant}; as JSON text too.
      num_images: the record's pictures.
    Raises:
      Skipped: the first thing that is wrong.
    """
    turns, pairs = [], False
    for turn in _list(value):
        if isinstance(turn, dict) and {"user", "assistant"} <= turn.keys():
            pairs = True
            turns += [("user", turn["user"]), ("assistant", turn["assistant"])]
        else:
            turns.append(_turn(turn, options.image_marker))
    clean_turns = []
    for role, content in turns:
        try:
            text = clean(content, "turn", options.max_chars)
        except Skipped as e:
            if e.reason == "turn: empty" and role == "system":
                continue  # LLaVA's and ShareGPT's empty system prompts
            raise
        clean_turns.append(
            {"role": role, "content": mark(text, options) if role == "user" else text}
        )
    clean_turns = _ordered(clean_turns)
    tags = sum(t["content"].count(options.image_tag) for t in clean_turns if t["role"] == "user")
    if pairs and not tags:  # this form has its pictures in front, without a mark
        first = next(t for t in clean_turns if t["role"] == "user")
        first["content"] = f"{options.image_tag}\n" * num_images + first["content"]
        tags = num_images
    _check_count(tags, num_images)
    return clean_turns


def _list(value: Any) -> Sequence[Any]:
    if value is None:
        raise Skipped("conversation: missing")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise Skipped("conversation: not a list of turns", str(e)) from e
    if isinstance(value, dict) and isinstance(value.get("role"), list):  # as tfds gives it
        contents = value.get("content")
        if not isinstance(contents, list) or len(contents) != len(value["role"]):
            raise Skipped("conversation: not a list of turns", "as many roles as contents")
        value = [{"role": r, "content": c} for r, c in zip(value["role"], contents, strict=True)]
    if not isinstance(value, list):
        raise Skipped("conversation: not a list of turns", type(value).__name__)
    if not value:
        raise Skipped("conversation: empty")
    return value


def _turn(turn: Any, marker: str) -> tuple[str, Any]:
    """(our role, content) of one turn."""
    if not isinstance(turn, dict):
        raise Skipped("conversation: turn without role and text", type(turn).__name__)
    role = turn["from"] if "from" in turn else turn.get("role")
    content = turn["value"] if "value" in turn else turn.get("content")
    if not isinstance(role, str):
        raise Skipped("conversation: turn without role and text", f"keys {sorted(turn)}"[:80])
    role = role.strip().lower()
    name = "user" if role in USER else "assistant" if role in ASSISTANT else role
    if name not in ("user", "assistant", "system"):
        raise Skipped("conversation: unknown role", role[:40])
    if isinstance(content, list):
        content = "".join(_part(part, marker) for part in content)
    return name, content


def _part(part: Any, marker: str) -> str:
    """A piece of a content list as text."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type")
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            return part["text"]
        if kind in ("image", "image_url", "input_image"):
            return marker + "\n"
    raise Skipped("conversation: part that is neither text nor picture", str(part)[:60])


def _ordered(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns, without a last question; their order checked."""
    body = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if any(t["role"] == "system" for t in body):
        raise Skipped("conversation: system turn that is not the first")
    if body and body[0]["role"] == "assistant":
        raise Skipped("conversation: begins with the assistant")
    for i, turn in enumerate(body):
        if turn["role"] != ("user", "assistant")[i % 2]:
            raise Skipped(
                "conversation: turns do not alternate", f"two of {turn['role']}, turn {i}"
            )
    if len(body) < 2:
        raise Skipped("conversation: no answer")
    return turns[:-1] if len(body) % 2 else turns


def _check_count(tags: int, num_images: int) -> None:
    if tags < num_images:
        raise Skipped("pictures: more than their marks", f"{num_images} pictures, {tags} marks")
    if tags > num_images:
        raise Skipped("pictures: fewer than their marks", f"{num_images} pictures, {tags} marks")
