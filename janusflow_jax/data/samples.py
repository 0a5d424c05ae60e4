"""Record -> samples: which tokens, which of them are targets, where the images are.

A *record* is one entry of a data set. Its fields say what it is:

    captions (and image)             an image with captions
    conversation (and image/images)  turns {role, content}; an image tag marks each image
    text and images                  an interleaved document; an image tag marks each image
    text                             text-only

A *unit* is the part of a record that is never split: an exchange of turns that ends with an answer,
an image of a document with the text behind it, an image with its caption. A *sample* is one or more
consecutive units of a record. In a row it is one segment with positions from 0. Text-only
records have no units; they are divided anywhere. A long one has *marks*: places where it can be
tokenized in parts, so that a sample does not need the tokens of the whole.

An image with captions is measured by its longest caption and trained with one of them, drawn anew
each time.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format

QUESTION = "Describe the picture."
"""What a user asks about an image that has only captions."""
_CHARACTERS = 4
"""Of a token, on average; see `excerpt`."""
_MARK = 2048
"""Tokens between two marks of a text."""
_TRIES = 16
"""Places that are tried for a mark, token after token."""

Turns = list[dict[str, str]]


class Unit(NamedTuple):
    """Tokens of a unit, without the positions of images.

    first: when a sample begins with it (BOS and the system prompt included); more: when it
    follows another; images: how many it holds.
    """

    first: int
    more: int
    images: int


class Mark(NamedTuple):
    """A place in a long text. Stored as a `Unit` behind the record's own (images: 0)."""

    token: int  # tokens in front of it, without BOS
    character: int  # of the text, where the next token begins


@dataclasses.dataclass(frozen=True)
class Sample:
    """Tokens of one sample. `prompt_mask` marks what guidance may drop (not BOS)."""

    tokens: np.ndarray  # int32[n]
    target_mask: np.ndarray  # bool[n], True where the next position's token is a target
    prompt_mask: np.ndarray  # bool[n]
    slot_starts: list[int]  # first position of each image, in the sample
    images: list[Any]  # encoded, one a slot

    def cut(self, begin: int, end: int, head: int) -> Sample:
        """Text-only: BOS (`head` tokens), then tokens [begin, end) of what follows it."""
        mask = self.target_mask.copy()
        mask[head + end - 1 :] = False  # the last position's next token is not there
        keep = np.r_[0:head, head + begin : head + end]
        return dataclasses.replace(
            self,
            tokens=self.tokens[keep],
            target_mask=mask[keep],
            prompt_mask=self.prompt_mask[keep],
        )


# --- fields of a record


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
    if isinstance(value, dict):  # tfds returns a sequence of turns as a dict of lists
        value = value.get("role")
    return value is not None and len(value) > 0


def captions_of(record: dict[str, Any]) -> list[str]:
    """The captions that are not empty, stripped.

    Raises:
      DataError: there is none.
    """
    captions = [c.strip() for c in record.get("captions", []) if c.strip()]
    if not captions:
        raise DataError(f"expected a caption with text; got {record.get('captions', [])!r}")
    return captions


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
    """The record's images, encoded: `images`, or the one `image`."""
    images = record.get("images")
    return list(images) if images is not None else [record["image"]] if "image" in record else []


def turns_of(record: dict[str, Any]) -> tuple[str, Turns]:
    """(system prompt, turns) of a conversation.

    Args: record: its turns are a list of {role, content}, or tfds's {'role': [], 'content': []}.
    Raises:
      DataError: a turn without role and content.
    """
    turns = record["conversation"]
    if isinstance(turns, dict):
        turns = [
            {"role": r, "content": c} for r, c in zip(turns["role"], turns["content"], strict=True)
        ]
    if not all({"role", "content"} <= set(turn) for turn in turns):
        raise DataError("conversation: expected turns with role and content")
    turns = [{"role": t["role"].lower(), "content": t["content"].strip()} for t in turns]
    if turns and turns[0]["role"] == "system":
        return turns[0]["content"], turns[1:]
    return chat_format.SYSTEM_PROMPT, turns


def exchanges(turns: Turns) -> list[Turns]:
    """Turns in groups that end with an answer; a last question without one is left out.

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


# --- measured and encoded


def units(record: dict[str, Any], task: str, form: str, chat: chat_format.ChatFormat) -> list[Unit]:
    """The lengths of a record's units; of a text-only record, one unit and its marks.

    Raises:
      DataError: the record makes no sample.
    """
    slot, head = 1 + chat.num_image_tokens, chat.head
    what = kind(record, task)
    if what == "text":
        texts = texts_of(record)
        longest = max(len(chat.plain_text(text).ids) for text in texts)
        marks = text_marks(texts[0], chat) if len(texts) == 1 and longest > 2 * _MARK else []
        return [Unit(longest, longest - head, 0), *(Unit(*mark, 0) for mark in marks)]
    if what == "caption":
        lengths = [len(_caption(c, task, form, chat)[0].ids) - slot for c in captions_of(record)]
        return [Unit(max(lengths), max(lengths) - head, 1)]
    images, encode_units = _divisible(record, what, task, chat)
    return [
        Unit(
            first=len(encode_units(i, i + 1, True).ids) - slot * count,
            more=len(encode_units(i, i + 1, False).ids) - slot * count - head,
            images=count,
        )
        for i, count in enumerate(images)
    ]


def text_marks(text: str, chat: chat_format.ChatFormat) -> list[Mark]:
    """Marks of a text, at most one every `_MARK` tokens.

    The parts between them, tokenized each alone, give the tokens of the whole text. That is
    checked, not assumed. A tokenizer that puts a space in front of every text (SentencePiece's)
    has no such places, and the list is empty.
    """
    whole = chat.text_tokenizer.encode(text, add_special_tokens=False)
    targets = chat.plain_text(text).target_mask[:-1]
    if chat.prefix or not targets.all():
        return []

    def fits(begin: Mark, end: Mark) -> bool:
        part = text[begin.character : end.character]
        ids = chat.text_tokenizer.encode(part, add_special_tokens=False).ids
        return ids == whole.ids[begin.token : end.token]

    marks, last = [Mark(0, 0)], Mark(len(whole.ids), len(text))
    while marks[-1].token + 2 * _MARK <= last.token:
        first = marks[-1].token + _MARK
        places = range(first, min(first + _TRIES, last.token))
        ends = (Mark(i, whole.offsets[i][0]) for i in places)
        end = next((end for end in ends if fits(marks[-1], end)), None)
        if end is None:
            break
        marks.append(end)
    while len(marks) > 1 and not fits(marks[-1], last):
        marks.pop()
    return marks[1:]


def encode(
    record: dict[str, Any],
    task: str,
    form: str,
    chat: chat_format.ChatFormat,
    choose: Callable[[int], int],
    begin: int = 0,
    end: int = -1,
    marks: Sequence[Mark] = (),
) -> Sample:
    """Units [begin, end) of a record as a sample; of a text-only record, tokens [begin, end).

    Args:
      task: generate | understand | text.
      form: chat | plain; for captions.
      choose: n -> which of n captions.
      end: -1 for all of it.
      marks: of a text-only record, with an `end`; only the parts around the sample are tokenized.
    Raises:
      DataError: the record makes no sample, or has fewer units than were measured.
    """
    what = kind(record, task)
    if what == "text":
        texts, head, before = texts_of(record), chat.head, 0
        text = texts[choose(len(texts))]
        if marks:
            before, sample = _between_marks(text, chat, begin, end, marks)
        else:
            sample = _sample(chat.plain_text(text), [])
        size = before + len(sample.tokens) - head
        end = size if end < 0 else min(end, size)
        if begin >= end:
            raise DataError(f"expected more than {begin} tokens, as measured; got {size}")
        if (begin, end) == (before, size):
            return sample
        return sample.cut(begin - before, end - before, head)
    if what == "caption":
        captions = captions_of(record)
        encoded, prompt = _caption(captions[choose(len(captions))], task, form, chat)
        sample = _sample(encoded, images_of(record)[:1])
        sample.prompt_mask[chat.head : prompt] = True
        return sample
    images, encode_units = _divisible(record, what, task, chat)
    end = len(images) if end < 0 else min(end, len(images))
    if begin >= end:
        raise DataError(f"expected more than {begin} exchanges, as measured; got {len(images)}")
    inside = slice(sum(images[:begin]), sum(images[:end]))
    return _sample(encode_units(begin, end, True), images_of(record)[inside])


def _between_marks(
    text: str, chat: chat_format.ChatFormat, begin: int, end: int, marks: Sequence[Mark]
) -> tuple[int, Sample]:
    """The parts between marks that hold tokens [begin, end) of a text: (tokens in front, sample).

    Raises:
      DataError: a part has another number of tokens than when its marks were made.
    """
    marks = [Mark(0, 0), *marks]
    first = bisect.bisect_right(marks, begin, key=lambda mark: mark.token) - 1
    after = bisect.bisect_left(marks, end, key=lambda mark: mark.token)
    tokens = chat.plain_text("").ids[: chat.head]
    for mark, following in zip(marks[first:after], [*marks[first + 1 :], None], strict=False):
        part = text[mark.character : following.character if following else None]
        ids = chat.plain_text(part).ids[chat.head :]
        if following:  # the text continues: no eos
            ids = ids[:-1]
            if len(ids) != following.token - mark.token:
                raise DataError(
                    f"expected {following.token - mark.token} tokens between two marks, as "
                    f"measured; got {len(ids)}: measure lengths again"
                )
        tokens = np.append(tokens, ids)
    mask = np.ones(len(tokens), bool)  # `text_marks` has checked that all are targets
    mask[-1] = False
    return marks[first].token, Sample(tokens, mask, np.zeros(len(tokens), bool), [], [])


def excerpt(
    record: dict[str, Any],
    chat: chat_format.ChatFormat,
    units: tuple[int, int],
    room: int,
    draw: Callable[[int], Any],
) -> Sample:
    """A random stretch of a text-only record, of at most `room` positions.

    Only the part of a long text that is used is tokenized.

    Args:
      units: [begin, end) of a conversation.
      draw: n -> a random integer below n.
    Raises:
      DataError: the record makes no sample.
    """
    head = chat.head
    if kind(record, "text") != "text":
        sample = encode(record, "text", "chat", chat, lambda n: 0, *units)
        start = int(draw(max(len(sample.tokens) - room, 0) + 1))
        size = len(sample.tokens) - head
        return sample.cut(start, min(start + room - head, size), head)
    texts = texts_of(record)
    text = texts[int(draw(len(texts)))]
    start = int(draw(max(len(text) - _CHARACTERS * room, 0) + 1))
    if start:  # begin between two words if a space is near
        start = max(text.find(" ", start, start + 32), start)
    end = start + 4 * _CHARACTERS * room
    sample = _sample(chat.plain_text(text[start:end]), [])
    is_open = end < len(text)  # the text continues: no eos
    size = max(len(sample.tokens) - head - is_open, 1)
    return sample.cut(0, min(size, room - head), head)


def _caption(
    text: str, task: str, form: str, chat: chat_format.ChatFormat
) -> tuple[chat_format.Encoded, int]:
    """An image with one caption, and where its prompt ends (0: nothing may be dropped)."""
    if task == "generate":
        prompt = chat.generation_ids(text, form)
        ids = np.array(prompt + [chat.gen_id] * (1 + chat.num_image_tokens), np.int32)
        return chat_format.Encoded(ids, [len(prompt)], np.zeros(len(ids), bool)), len(prompt)
    if form == "plain":
        return chat.plain_caption(text), 0
    turns = [
        {"role": "user", "content": f"{chat.image_tag}\n{QUESTION}"},
        {"role": "assistant", "content": text},
    ]
    return chat.conversation(turns, 1), 0


def _divisible(
    record: dict[str, Any], what: str, task: str, chat: chat_format.ChatFormat
) -> tuple[list[int], Callable[[int, int, bool], chat_format.Encoded]]:
    """The units of a conversation or a document.

    Returns:
      (images of each unit, encode): encode(begin, end, first) gives units [begin, end) as one
      sequence; `first`: a sample begins with them, so a conversation has its system prompt.
    Raises:
      DataError: another number of image tags than images, or an unknown role.
    """
    tag = chat.image_tag
    if what == "interleaved":
        front, *behind = record["text"].strip().split(tag)
        passages = ([front] if front else []) + [tag + text for text in behind]
        images = [text.count(tag) for text in passages]

        def encode_units(begin: int, end: int, first: bool) -> chat_format.Encoded:
            closed = end == len(passages)
            return chat.interleaved("".join(passages[begin:end]), closed)

    else:
        system, turns = turns_of(record)
        if wrong := sorted({t["role"] for t in turns} - {"user", "assistant"}):
            raise DataError(f"conversation: expected roles user and assistant; got {wrong}")
        groups = exchanges(turns)
        images = [
            sum(turn["content"].count(tag) for turn in group if turn["role"] == "user")
            for group in groups
        ]

        def encode_units(begin: int, end: int, first: bool) -> chat_format.Encoded:
            turns = [turn for group in groups[begin:end] for turn in group]
            num_images = sum(images[begin:end])
            return chat.conversation(turns, num_images, system=system if first else "")

    tags, count = sum(images), len(images_of(record))
    if task == "text" and (tags or count):
        raise DataError(f"expected no images in a text-only source; got {max(tags, count)}")
    if tags != count:
        raise DataError(f"expected an image tag for each of the {count} images; got {tags}")
    return images, encode_units


def _sample(encoded: chat_format.Encoded, images: Sequence[Any]) -> Sample:
    if len(encoded.slot_starts) != len(images):
        raise DataError(f"expected {len(encoded.slot_starts)} image(s); got {len(images)}")
    empty = np.zeros(len(encoded.ids), bool)
    return Sample(encoded.ids, encoded.target_mask, empty, encoded.slot_starts, list(images))
