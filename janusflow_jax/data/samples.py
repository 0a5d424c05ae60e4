"""One record -> its samples: which tokens, which of them are targets, where its images stand.

The forms of SPEC section 2. What a record is follows from its fields:

    captions (and image)             a picture with captions: generation or understanding
    conversation (and image/images)  turns {role, content}; an image tag marks each image
    text and images                  an interleaved document; an image tag marks each image
    text                             text-only

A record is made of units that are never split (an exchange of turns, an image with the text
behind it); text-only records are cut anywhere. A picture's sample is measured by its longest
caption and trained with one of its captions, drawn anew each time it comes up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format

QUESTION = "Describe the picture."
"""What a user asks about a picture that has only captions."""

Turns = list[dict[str, str]]


class Unit(NamedTuple):
    """A stretch of a record that is never split, in tokens without the positions of images.

    first: when a sample begins with it (BOS and the system prompt included); more: when it
    follows another; images: how many it holds.
    """

    first: int
    more: int
    images: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """Tokens of one sample. `prompt_mask` marks what guidance may drop (BOS is kept)."""

    tokens: np.ndarray  # int32[n]
    target_mask: np.ndarray  # bool[n], of the next position
    prompt_mask: np.ndarray  # bool[n]
    slot_starts: list[int]  # positions in the sample
    images: list[Any]  # encoded, one a slot

    def cut(self, begin: int, end: int, head: int) -> Sample:
        """Text-only: tokens [begin, end) of the body (what follows the `head` of BOS), BOS in
        front; the last position has no target, because the next token is not there."""
        mask = self.target_mask.copy()
        mask[head + end - 1 :] = False
        keep = np.r_[0:head, head + begin : head + end]
        return dataclasses.replace(
            self,
            tokens=self.tokens[keep],
            target_mask=mask[keep],
            prompt_mask=self.prompt_mask[keep],
        )


def captions_of(record: dict[str, Any]) -> list[str]:
    """The captions that say something, stripped.

    Raises:
      DataError: there is none.
    """
    found = [c.strip() for c in record.get("captions", []) if c.strip()]
    if not found:
        raise DataError(
            f"expected at least one caption with text; got {record.get('captions', [])!r}"
        )
    return found


def texts_of(record: dict[str, Any]) -> list[str]:
    """What a text-only source reads: the text, or the captions where a record has no text.

    Raises:
      DataError: there is neither.
    """
    text = record.get("text", "").strip()
    if not text and not record.get("captions"):
        raise DataError("expected text or captions; got none")
    return [text] if text else captions_of(record)


def images_of(record: dict[str, Any]) -> list[Any]:
    """The record's pictures, encoded: `images`, or the one `image`."""
    found = record.get("images")
    return list(found) if found is not None else [record["image"]] if "image" in record else []


def turns_of(record: dict[str, Any]) -> tuple[str, Turns]:
    """(system prompt, turns) of a conversation.

    tfds gives a sequence of turns as {'role': [...], 'content': [...]}; a list of turns does too.

    Raises:
      DataError: a turn without role and content.
    """
    given = record["conversation"]
    if isinstance(given, dict):
        given = [
            {"role": r, "content": c} for r, c in zip(given["role"], given["content"], strict=True)
        ]
    if not all({"role", "content"} <= set(turn) for turn in given):
        raise DataError("conversation: expected turns with role and content")
    turns = [{"role": t["role"].lower(), "content": t["content"].strip()} for t in given]
    if turns and turns[0]["role"] == "system":
        return turns[0]["content"], turns[1:]
    return chat_format.SYSTEM_PROMPT, turns


def exchanges(turns: Turns) -> list[Turns]:
    """Turns in groups that end with an answer; a last question without one teaches nothing.

    Raises:
      DataError: no answer at all.
    """
    out: list[Turns] = [[]]
    for turn in turns:
        out[-1].append(turn)
        if turn["role"] == "assistant" and turn["content"]:
            out.append([])
    if len(out) == 1:
        raise DataError("conversation: expected an answer of the assistant; got none")
    return out[:-1]


def kind(record: dict[str, Any], task: str) -> str:
    """caption | conversation | interleaved | text: see the top of this file."""
    if task == "generate":
        return "caption"
    if _has(record, "conversation"):
        return "conversation"
    if task == "text":
        return "text"
    return "interleaved" if _has(record, "images") and record.get("text") else "caption"


def _has(record: dict[str, Any], name: str) -> bool:
    value = record.get(name)
    if isinstance(value, dict):  # a sequence of turns as tfds gives it
        value = value.get("role")
    return value is not None and len(value) > 0


def units(record: dict[str, Any], task: str, form: str, chat: chat_format.ChatFormat) -> list[Unit]:
    """The record measured.

    Raises:
      DataError: it makes no sample.
    """
    slot = 1 + chat.num_image_tokens
    head = int(chat.add_bos)
    what = kind(record, task)
    if what == "text":
        longest = max(len(chat.plain_text(t).ids) for t in texts_of(record))
        return [Unit(longest, longest - head, 0)]
    if what == "caption":
        lengths = [len(_captioned(c, task, form, chat)[0].ids) - slot for c in captions_of(record)]
        return [Unit(max(lengths), max(lengths) - head, 1)]
    out = []
    images = images_of(record)
    pieces = _pieces(record, what, chat)
    _check_images(sum(p.images for p in pieces), len(images), task)
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        first = len(piece.encode(True, last).ids) - slot * piece.images
        more = len(piece.encode(False, last).ids) - slot * piece.images - head
        out.append(Unit(first, more, piece.images))
    return out


def make(
    record: dict[str, Any],
    task: str,
    form: str,
    chat: chat_format.ChatFormat,
    choose: Callable[[int], int],
    begin: int = 0,
    end: int = -1,
) -> Sample:
    """Units [begin, end) of a record as a sample; of a text-only record, tokens [begin, end).

    Args:
      task: generate | understand | text.
      form: chat | plain; for captions.
      choose: n -> which of n captions.
      end: -1: all of it.
    Raises:
      DataError: it makes no sample.
    """
    what = kind(record, task)
    if what == "text":
        found = texts_of(record)
        sample = _sample(chat.plain_text(found[choose(len(found))]))
        head = int(chat.add_bos)
        size = len(sample.tokens) - head
        end = size if end < 0 else min(end, size)
        if begin >= end:
            raise DataError(f"expected more than {begin} tokens, as measured; got {size}")
        return sample.cut(begin, end, head) if (begin, end) != (0, size) else sample
    if what == "caption":
        found = captions_of(record)
        encoded, prompt = _captioned(found[choose(len(found))], task, form, chat)
        sample = _sample(encoded, images_of(record)[:1])
        sample.prompt_mask[int(chat.add_bos) : prompt] = True
        return sample
    pieces = _pieces(record, what, chat)
    images = images_of(record)
    _check_images(sum(p.images for p in pieces), len(images), task)
    end = len(pieces) if end < 0 else end
    first_image = sum(p.images for p in pieces[:begin])
    chosen = pieces[begin:end]
    if not chosen:
        raise DataError(f"expected more than {begin} exchanges, as measured; got {len(pieces)}")
    whole = chosen[0].join(chosen)
    encoded = whole.encode(True, end == len(pieces))
    return _sample(encoded, images[first_image : first_image + whole.images])


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """Turns up to an answer."""

    chat: chat_format.ChatFormat
    system: str
    turns: Turns
    images: int

    def encode(self, first: bool, last: bool) -> chat_format.Encoded:
        del last  # every answer is closed
        system = self.system if first else ""
        return self.chat.conversation(self.turns, self.images, system=system)

    def join(self, many: Sequence[_Exchange]) -> _Exchange:
        turns = [turn for one in many for turn in one.turns]
        return dataclasses.replace(self, turns=turns, images=sum(one.images for one in many))


@dataclasses.dataclass(frozen=True)
class _Passage:
    """A passage of a document: an image and the text behind it, or the text in front of all."""

    chat: chat_format.ChatFormat
    text: str
    images: int

    def encode(self, first: bool, last: bool) -> chat_format.Encoded:
        del first
        return self.chat.interleaved(self.text, self.images, closed=last)

    def join(self, many: Sequence[_Passage]) -> _Passage:
        text, images = "".join(one.text for one in many), sum(one.images for one in many)
        return dataclasses.replace(self, text=text, images=images)


def _pieces(record: dict[str, Any], what: str, chat: chat_format.ChatFormat) -> Sequence[Any]:
    """All of one kind: exchanges or passages."""
    tag = chat.image_tag
    if what == "interleaved":
        front, *behind = record["text"].strip().split(tag)
        passages = [_Passage(chat, tag + text, 1) for text in behind]
        return ([_Passage(chat, front, 0)] if front else []) + passages
    system, turns = turns_of(record)
    if wrong := sorted({t["role"] for t in turns} - {"user", "assistant"}):
        raise DataError(f"conversation: expected roles user and assistant; got {wrong}")
    return [
        _Exchange(
            chat,
            system,
            group,
            sum(t["content"].count(tag) for t in group if t["role"] == "user"),
        )
        for group in exchanges(turns)
    ]


def _check_images(marked: int, given: int, task: str) -> None:
    if task == "text" and (marked or given):
        raise DataError(f"expected no images in a text-only source; got {max(marked, given)}")
    if marked != given:
        raise DataError(f"expected an image tag for each of the {given} images; got {marked}")


def _captioned(
    text: str, task: str, form: str, chat: chat_format.ChatFormat
) -> tuple[chat_format.Encoded, int]:
    """A picture with one caption, and where its prompt ends (0: nothing may be dropped)."""
    if task == "generate":
        prompt = chat.generation_ids(text, form)
        ids = np.array(prompt + [chat.gen_id] * (1 + chat.num_image_tokens), np.int32)
        encoded = chat_format.Encoded(ids, [len(prompt)], np.zeros(len(ids), bool))
        return encoded, len(prompt)
    if form == "plain":
        return chat.plain_caption(text), 0
    turns = [
        {"role": "user", "content": f"{chat.image_tag}\n{QUESTION}"},
        {"role": "assistant", "content": text},
    ]
    return chat.conversation(turns, 1), 0


def _sample(encoded: chat_format.Encoded, images: Sequence[Any] = ()) -> Sample:
    if len(encoded.slot_starts) != len(images):
        raise DataError(f"expected {len(encoded.slot_starts)} image(s); got {len(images)}")
    empty = np.zeros(len(encoded.ids), bool)
    return Sample(encoded.ids, encoded.target_mask, empty, encoded.slot_starts, list(images))
