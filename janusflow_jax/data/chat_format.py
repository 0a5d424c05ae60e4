"""Text to token ids and back: the tokenizer, the image tags, the chat and the plain forms.

Tags and ids come from the folder's `processor_config.json`, `tokenizer_config.json` and
`tokenizer.json`. Only where a plain LLM's folder has no processor file, the tags are DEFAULT_TAGS.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

from janusflow_jax.config import files as config_files
from janusflow_jax.config.errors import DataError
from janusflow_jax.config.files import LFS_HELP, LFS_POINTER

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
"""The understanding chat's default system prompt; generation uses none."""

CAPTION_REQUEST = "Generate the caption of this picture."
"""The plain understanding form: `<image>{CAPTION_REQUEST} {caption}<eos>`."""

DEFAULT_TAGS = {
    "image_tag": "<image_placeholder>",
    "image_gen_tag": "<｜begin▁of▁generation｜>",
    "image_start_tag": "<image_beg>",
    "image_end_tag": "<image_end>",
}
"""Key of processor_config.json -> tag, in the order in which missing tags get new ids."""
MAX_LENGTH = 16384
"""Positions of the published model; tokenizer_config.json may set a lower limit."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
)


class Encoded(NamedTuple):
    """One sequence.

    ids: int32[n]; slot_starts: position of each image's first vector; target_mask: bool[n], True
    where the *next* position's token is a target of the language model.
    """

    ids: np.ndarray
    slot_starts: list[int]
    target_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Span:
    """Text whose tokens are targets from a character on (-1: none are)."""

    text: str
    target_from: int = -1


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
    """A tokenizer folder, loaded. Use `ChatFormat.load`. Safe to share between threads.

    `tokenizer` parses special strings in text, `text_tokenizer` treats them as text. `prefix` is
    the token of the space that the tokenizer puts before every text, or ''. `max_length` is the
    longest sequence of the model, in positions.
    """

    folder: str
    tokenizer: tokenizers.Tokenizer
    text_tokenizer: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    pad_id: int
    add_bos: bool
    image_id: int
    gen_id: int
    image_start_id: int
    image_end_id: int
    image_tag: str
    num_image_tokens: int
    added_tags: tuple[str, ...]
    prefix: str
    hash: str
    max_length: int

    @classmethod
    def load(cls, folder: epath.PathLike, num_image_tokens: int = 0) -> ChatFormat:
        """Loads a folder with tokenizer and processor files.

        Args:
          folder: holds tokenizer.json, tokenizer_config.json and, if it is JanusFlow's,
            processor_config.json.
          num_image_tokens: features an image; 0: as the processor file has it.
        Raises:
          DataError: a file is missing or cannot be read, or a token is missing.
        """
        path = config_files.resolve(folder)
        files = {n: (path / n).read_bytes() for n in TOKENIZER_FILES if (path / n).exists()}
        missing = [n for n in TOKENIZER_FILES[:2] if n not in files]
        if missing:
            raise DataError(
                f"{path}: expected a tokenizer folder (tokenizer.json, tokenizer_config.json); "
                f"missing {', '.join(missing)}"
            )
        try:
            values = [json.loads(files.get(name, b"{}")) for name in TOKENIZER_FILES[1:]]
            tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as e:  # tokenizers raises plain Exception
            is_pointer = any(data.startswith(LFS_POINTER) for data in files.values())
            reason = LFS_HELP if is_pointer else f"cannot read them: {e}"
            raise DataError(f"{path}: expected tokenizer files; {reason}") from e
        for name, value in zip(TOKENIZER_FILES[1:], values, strict=True):
            if not isinstance(value, dict):
                raise DataError(f"{path / name}: expected a JSON object; got {value!r:.80}")
        config, special, processor = values
        # NOTE(parity): as transformers does, special_tokens_map.json overrides a config that does
        # not list the added tokens itself.
        special = {key: token for key, token in special.items() if token}
        special = config if "added_tokens_decoder" in config else config | special
        names = [_content(path, special, f"{name}_token") for name in ("bos", "eos", "pad")]
        tags = {key: _content(path, processor, key) or tag for key, tag in DEFAULT_TAGS.items()}
        _add_special(tokenizer, [name for name in names if name])
        added = _add_special(tokenizer, list(tags.values()))
        bos_id, eos_id, pad_id = (tokenizer.token_to_id(n) if n else None for n in names)
        ids = {key: _id(tokenizer, tag) for key, tag in tags.items()}
        num_image_tokens = num_image_tokens or processor.get("num_image_tokens", 0)
        text_tokenizer = _text_only(tokenizer)
        prefix = _prefix(text_tokenizer)
        add_bos = _adds_bos(config, tokenizer, names[0])
        if eos_id is None or (add_bos and bos_id is None):
            raise DataError(
                f"{path}/tokenizer_config.json: expected eos_token, and bos_token where "
                f"add_bos_token is true; got {names[1]!r} and {names[0]!r}"
            )
        if not isinstance(num_image_tokens, int) or num_image_tokens <= 0:
            raise DataError(
                f"{path}/processor_config.json: expected num_image_tokens > 0 (or the argument); "
                f"got {num_image_tokens!r}"
            )
        return cls(
            folder=str(path),
            tokenizer=tokenizer,
            text_tokenizer=text_tokenizer,
            bos_id=-1 if bos_id is None else bos_id,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            add_bos=add_bos,
            image_id=ids["image_tag"],
            gen_id=ids["image_gen_tag"],
            image_start_id=ids["image_start_tag"],
            image_end_id=ids["image_end_tag"],
            image_tag=tags["image_tag"],
            num_image_tokens=num_image_tokens,
            added_tags=tuple(added),
            prefix=prefix,
            # Where 0.1 had other ids than this version, lengths are measured again.
            hash=_digest(
                files
                | ({} if add_bos or config.get("add_bos_token") is False else {"bos": b"no"})
                | ({"prefix": b"dropped"} if prefix else {})
            ),
            max_length=_max_length(config.get("model_max_length")),
        )

    @property
    def added_ids(self) -> list[int]:
        """The ids of `added_tags`."""
        return [_id(self.tokenizer, tag) for tag in self.added_tags]

    @property
    def vocab_needed(self) -> int:
        """Rows that the embedding table must have: the largest id plus one."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def head(self) -> int:
        """Tokens before the text of a prompt: 1 (BOS) or 0.

        A dropped prompt keeps them: in training (`data.samples`) and in the unconditional branch of
        guidance (`sampling.image`).
        """
        return len(self._bos())

    def check_vocab(self, vocab_size: int) -> None:
        """Raises DataError when a table of `vocab_size` rows has no row for an id."""
        if self.vocab_needed > vocab_size:
            tags = f" (the tags {', '.join(self.added_tags)} were added)" if self.added_tags else ""
            raise DataError(
                f"{self.folder}: expected ids below {vocab_size} (the embedding table's rows); "
                f"got up to {self.vocab_needed - 1}{tags}: use this model's own tokenizer, or a "
                "larger model.llm.vocab_size"
            )

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """Text of ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def generation_ids(self, prompt: str, form: str = "chat") -> list[int]:
        """The ids before a generated image: BOS .. 'Assistant:', or the bare prompt.

        Args:
          prompt: user text; special strings in it are text. Its ends are stripped.
          form: chat | plain.
        """
        text = prompt.strip()
        if form == "chat":
            text = f"User: {text}\n\nAssistant:"
        return self._bos() + self.text_tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(
        self,
        turns: Sequence[dict[str, Any]],
        num_images: int,
        closed: bool = True,
        system: str = SYSTEM_PROMPT,
    ) -> Encoded:
        """The chat form, with `num_image_tokens` positions for every image.

        Args:
          turns: {'role': 'user' | 'assistant', 'content': str or list of str}. In a user's text
            the image tag marks an image; a list holds the texts between its images, in which
            the tag is text (`parse_messages`). After a last turn by the user, or an empty
            answer, the text ends with 'Assistant:'.
          num_images: how many images there are.
          closed: whether a last answer ends with eos; False where it will be continued.
          system: system prompt; '' for none.
        Raises:
          DataError: unknown role, or another number of image tags than images.
        """
        turns = [{"role": t["role"].lower(), "content": self._pieces(t)} for t in turns]
        num_tags = sum(len(t["content"]) - 1 for t in turns)
        problems = [
            f"turn {i}: expected role user or assistant; got {t['role']!r}"
            for i, t in enumerate(turns)
            if t["role"] not in ("user", "assistant")
        ]
        if num_tags != num_images:
            problems.append(
                f"images: expected one {self.image_tag} in the user's text for each of the "
                f"{num_images} images; got {num_tags}"
            )
        if problems:
            raise DataError("conversation: " + "; ".join(problems))
        if not turns or turns[-1]["role"] == "user":
            turns.append({"role": "assistant", "content": [""]})
        parts: list[_Span | int] = []
        text = f"{system}\n\n" if system else ""
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                *pieces, last = turn["content"]
                text += "User: "
                for piece in pieces:
                    parts += [_Span(text + piece), self.image_id]
                    text = ""
                text += f"{last}\n\n"
                continue
            text += "Assistant:"
            if answer := turn["content"][0]:
                parts.append(_Span(f"{text} {answer}", target_from=len(text)))
                if closed or i + 1 < len(turns):
                    parts.append(self.eos_id)
                text = ""
        if text:
            parts.append(_Span(text))
        return self._encode(parts)

    def _pieces(self, turn: dict[str, Any]) -> list[str]:
        """The texts between the images of a turn, without spaces at its two ends."""
        content = turn["content"]
        if not isinstance(content, str):
            content = list(content)
        elif turn["role"].lower() == "user":
            content = content.strip().split(self.image_tag)
        else:
            content = [content]
        content[0] = content[0].lstrip()
        content[-1] = content[-1].rstrip()
        return content

    def plain_caption(self, caption: str) -> Encoded:
        """`<image>Generate the caption of this picture. {caption}<eos>`; the caption is target."""
        head = CAPTION_REQUEST
        span = _Span(f"{head} {caption.strip()}", target_from=len(head))
        return self._encode([self.image_id, span, self.eos_id])

    def plain_text(self, text: str) -> Encoded:
        """`{text}<eos>`; everything but BOS is target."""
        return self._encode([_Span(text, target_from=0), self.eos_id])

    def interleaved(self, text: str, closed: bool = True) -> Encoded:
        """A document of text and images; every text token but BOS is target, and eos.

        Args:
          text: the image tag marks each image.
          closed: whether the document ends with this text, and so with eos.
        """
        first, *others = text.split(self.image_tag)
        parts: list[_Span | int] = [_Span(first, target_from=0)]
        for other in others:
            parts += [self.image_id, _Span(other, target_from=0)]
        return self._encode([*parts, self.eos_id] if closed else parts)

    def _bos(self) -> list[int]:
        return [self.bos_id] if self.add_bos else []

    def _encode(self, parts: Sequence[_Span | int]) -> Encoded:
        """Joins spans, eos and images; an eos is a target where an answer stands before it."""
        ids = self._bos()
        target = [False] * len(ids)  # of this position's own token; shifted at the end
        starts = []
        open_target = False
        for part in parts:
            if isinstance(part, _Span):
                encoding = self.text_tokenizer.encode(part.text, add_special_tokens=False)
                open_target = part.target_from >= 0
                # `tokens` and `offsets` make a Python object of every token, and no other thread
                # runs meanwhile: they are read only where they decide something.
                cut = 0
                # The tokenizer's space belongs before the sequence, not behind an image.
                if self.prefix and len(ids) > self.head and not part.text.startswith(" "):
                    cut = int(encoding.tokens[:1] == [self.prefix])
                new = encoding.ids[cut:]
                ids += new
                if open_target:
                    target += [end > part.target_from for _, end in encoding.offsets[cut:]]
                else:
                    target += [False] * len(new)
            elif part == self.image_id:
                starts.append(len(ids))
                ids.append(self.image_start_id)
                ids += [self.image_id] * self.num_image_tokens + [self.image_end_id]
                target += [False] * (self.num_image_tokens + 2)
            else:
                ids.append(part)
                target.append(open_target)
        mask = np.array(target[1:] + [False], bool)
        return Encoded(np.array(ids, np.int32), starts, mask)


def parse_messages(messages: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in OpenAI's or transformers' form -> turns and images.

    Nothing is decoded, read or fetched here. Every text is plain text, tags in it too.

    Args:
      messages: {'role': 'system' | 'developer' | 'user' | 'assistant', 'content': a text or parts
        as of `content_parts`}.
    Returns:
      {'role': 'system' | 'user' | 'assistant', 'content': list of str}, of which only the first may
      be a system turn; and the images as they stand in the parts, in order.
    Raises:
      DataError: with every problem.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages: expected a list of messages; got {messages!r:.80}")
    turns, images, problems = [], [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            problems.append(f"message {i}: expected {{'role', 'content'}}; got {message!r:.40}")
            continue
        role, content = message.get("role"), message.get("content")
        role = {"developer": "system"}.get(str(role).lower(), str(role).lower())
        if role not in ("system", "user", "assistant"):
            problems.append(
                f"message {i}: expected the role system, user or assistant; got "
                f"{message.get('role')!r:.40}"
            )
        if role == "system" and i:
            problems.append(f"message {i}: expected a system message in the first place only")
        try:
            pieces, own = content_parts(content)
        except DataError as error:
            problems.append(f"message {i}: {error}")
            continue
        if own and role != "user":
            problems.append(f"message {i}: expected images in user messages only; got {role}")
        turns.append({"role": role, "content": pieces})
        images += own
    if not problems and [turn["role"] for turn in turns] == ["system"]:
        problems.append("expected a user message; got a system message alone")
    if problems:
        raise DataError("messages: " + "; ".join(problems))
    return turns, images


def content_parts(content: Any) -> tuple[list[str], list[Any]]:
    """The content of a message -> the texts between its images, and the images.

    Lines are broken between parts, so that images in front of a text read as the published form
    `<image>\\n<image>\\ntext`.

    Args:
      content: a text, or a list of {'type': 'text', 'text': ...}, OpenAI's {'type': 'image_url',
        'image_url': {'url': ...}} and transformers' {'type': 'image', 'image' | 'url' | 'path' |
        'base64': ...}.
    Returns:
      n + 1 texts for n images; the images as they stand in the parts.
    Raises:
      DataError: with every problem.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not content:
        raise DataError(f"content: expected a text or a list of parts; got {content!r:.40}")
    pieces, images, problems = [[""]], [], []  # the texts of each piece
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if i and not pieces[-1][-1].endswith("\n"):
            pieces[-1].append("\n")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str) or not _is_unicode(text):
                problems.append(
                    f"part {i}: expected 'text' of Unicode characters; got {text!r:.40}"
                )
                continue
            if text:
                pieces[-1].append(text)
        elif kind in ("image_url", "image"):
            image = _image_of(part)
            if image is None:
                problems.append(f"part {i}: expected an image in it; got the keys {[*part]!r:.80}")
                continue
            images.append(image)
            pieces.append([""])
        else:
            problems.append(
                f"part {i}: expected the type text, image_url or image; got {kind!r:.40}"
            )
    if problems:
        raise DataError("content: " + "; ".join(problems))
    return ["".join(texts) for texts in pieces], images


def _image_of(part: dict[str, Any]) -> Any:
    """The image of a part as it stands there; None if there is none."""
    if part["type"] == "image_url":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, dict) else value
    values = [part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None]
    if len(values) == 1 and "base64" in part:
        return f"data:image/*;base64,{values[0]}"
    return values[0] if len(values) == 1 else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _content(path: epath.Path, config: dict[str, Any], key: str) -> str:
    """The text of a special token, which config files write as a string or as a dict."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise DataError(f"{path}: {key}: expected the text of a token; got {token!r:.80}")
    return text or ""


def _adds_bos(config: dict[str, Any], tokenizer: tokenizers.Tokenizer, bos: str) -> bool:
    """Whether the tokenizer itself puts the BOS in front of a text."""
    # NOTE(parity): transformers' Llama tokenizers go by the config alone, and theirs is the default
    # of True. The template in tokenizer.json adds a BOS in one of the two published forms of
    # JanusFlow and not in the other. Other tokenizers go by the template.
    if config.get("add_bos_token") is not None:
        return bool(config["add_bos_token"])
    if bos and "Llama" in str(config.get("tokenizer_class")):
        return True
    return bool(bos) and tokenizer.encode("").tokens[:1] == [bos]


def _prefix(tokenizer: tokenizers.Tokenizer) -> str:
    """The token of a space that the tokenizer puts before a text (SentencePiece's), or ''."""
    tokens = tokenizer.encode("\n", add_special_tokens=False).tokens
    return "▁" if tokens[:1] == ["▁"] else ""


def _max_length(length: Any) -> int:
    """`model_max_length`, which is missing or huge where a tokenizer has no limit of its own."""
    return length if isinstance(length, int) and 0 < length < MAX_LENGTH else MAX_LENGTH


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def _add_special(tokenizer: tokenizers.Tokenizer, tokens: Sequence[str]) -> list[str]:
    """Marks tokens as special. Those without an id get the next ids, and are returned."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    new = []
    for token in tokens:
        if token not in special:
            if tokenizer.token_to_id(token) is None:
                new.append(token)
            tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True)])
    return new


def _text_only(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that encodes special strings as text.

    It must be a copy: the flag belongs to the object, and other threads share the object.
    """
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}:{len(files[name])}:".encode() + files[name])
    return digest.hexdigest()
