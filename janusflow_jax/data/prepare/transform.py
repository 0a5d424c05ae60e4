"""One raw record -> one record of the data set: the same function on one machine and on many."""

from __future__ import annotations

import hashlib
from typing import Any

from janusflow_jax.data.prepare import pictures, texts
from janusflow_jax.data.prepare.raw import Options, Raw, Skipped

SPLITS = ("train", "heldout")


def record(raw: Raw, options: Options) -> tuple[dict[str, Any], list[Skipped]]:
    """A record with the fields of `samples.py`, pictures still encoded.

    Returns:
      (record, what was dropped from it: single captions of several).
    Raises:
      Skipped: it cannot be used; the text is checked first, because pictures cost more.
    """
    out: dict[str, Any] = {"id": _id(raw)}
    dropped: list[Skipped] = []
    if options.kind == "captions":
        if len(raw.images) != 1:
            what = "picture: missing" if not raw.images else "picture: more than one"
            raise Skipped(what, f"expected one; got {len(raw.images)}")
        out["captions"], dropped = texts.captions(raw.captions, options.max_chars)
        out["image"] = pictures.load(raw.images[0], options)
        return out, dropped
    if options.kind == "text":
        out["text"] = texts.clean(raw.text, "text", options.max_document)
        return out, dropped
    if options.kind == "conversation":
        out["conversation"] = texts.conversation(raw.turns, len(raw.images), options)
    else:
        out["text"] = texts.document(raw.text, len(raw.images), options)
    out["images"] = [pictures.load(image, options) for image in raw.images]
    return out, dropped


def split_of(record_id: str, heldout: float) -> str:
    """train or heldout, by a hash of the id alone: a record never changes sides."""
    return SPLITS[int(hash_of(record_id, "split") / 2**64 < heldout)]


def hash_of(text: str, purpose: str) -> int:
    """64 bits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "big")


def _id(raw: Raw) -> str:
    if isinstance(raw.id, bool) or not isinstance(raw.id, (str, int)):
        raise Skipped("id: neither text nor number", f"{type(raw.id).__name__} {str(raw.id)[:40]}")
    return texts.clean(str(raw.id), "id", 4096)
