"""One record -> one sample: which tokens, which of them are targets, where its image stands.

The forms of SPEC section 2. A sample is measured by its longest caption and trained with one of
its captions, drawn anew each time it comes up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from janusflow_jax.data import chat_format

QUESTION = "Describe the picture."
"""What a user asks about a picture that has only captions."""

NONE, GENERATE, UNDERSTAND = 0, 1, 2
"""Values of slot_task."""


class BadRecord(ValueError):
    """A record that makes no sample; the message says why."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Tokens of one sample. `prompt_mask` marks what guidance may drop (BOS is kept)."""

    tokens: np.ndarray  # int32[n]
    target_mask: np.ndarray  # bool[n], of the next position
    prompt_mask: np.ndarray  # bool[n]
    slot_start: int  # position in the sample; -1 without image


def captions_of(record: dict[str, Any]) -> list[str]:
    """The captions that say something, stripped.

    Raises:
      BadRecord: there is none.
    """
    found = [c.strip() for c in record.get("captions", []) if c.strip()]
    if not found:
        raise BadRecord(
            f"expected at least one caption with text; got {record.get('captions', [])!r}"
        )
    return found


def texts_of(record: dict[str, Any]) -> list[str]:
    """What a text-only source reads: the text, or the captions where a record has no text.

    Raises:
      BadRecord: there is neither.
    """
    text = record.get("text", "").strip()
    if not text and not record.get("captions"):
        raise BadRecord("expected text or captions; got none")
    return [text] if text else captions_of(record)


def measure(record: dict[str, Any], task: str, form: str, chat: chat_format.ChatFormat) -> int:
    """Tokens of the record's longest caption in its form, without image positions; 0 for none."""
    try:
        found = texts_of(record) if task == "text" else captions_of(record)
    except BadRecord:
        return 0
    if task == "text":
        return max(len(chat.plain_text(t).ids) for t in found)
    slot = 1 + chat.num_image_tokens
    return max(len(make(task, form, c, chat).tokens) - slot for c in found)


def make(task: str, form: str, text: str, chat: chat_format.ChatFormat) -> Sample:
    """The sample of one caption (or of one piece of text).

    Args:
      task: generate | understand | text.
      form: chat | plain.
      text: caption or text, stripped.
      chat: the tokenizer.
    """
    if task == "generate":
        prompt = chat.generation_ids(text, form)
        slot = 1 + chat.num_image_tokens
        tokens = np.array(prompt + [chat.gen_id] * slot, np.int32)
        prompt_mask = np.zeros(len(tokens), bool)
        prompt_mask[int(chat.add_bos) : len(prompt)] = True
        return Sample(tokens, np.zeros(len(tokens), bool), prompt_mask, len(prompt))
    if task == "text":
        encoded = chat.plain_text(text)
    elif form == "plain":
        encoded = chat.plain_caption(text)
    else:
        turns = [
            {"role": "user", "content": f"{chat.image_tag}\n{QUESTION}"},
            {"role": "assistant", "content": text},
        ]
        encoded = chat.conversation(turns, 1)
    start = encoded.slot_starts[0] if encoded.slot_starts else -1
    return Sample(encoded.ids, encoded.target_mask, np.zeros(len(encoded.ids), bool), start)
