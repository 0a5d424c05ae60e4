"""Input files -> rows: listing, opening, and lines and JSON of files that may be broken."""

from __future__ import annotations

import collections
import contextlib
import errno
import fnmatch
import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.config.files import LFS_HELP, LFS_POINTER, text_encoding
from janusflow_jax.data import sources

LINE_LIMIT = 2**28
"""Bytes of a line that are read; `records.clean_text` reports what is longer than its own limit."""
_SEPARATOR = re.compile(r"[\s,]*")
_NUMBER = re.compile(r"([0-9]+)")


class Skipped(Exception):
    """A row or a file that cannot be used. The run continues and counts it.

    Attributes:
      reason: one of few; a key of report.json.
      detail: what the input holds instead.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


Row = tuple[str, str, Any]
"""(place for the report, id made of the place, fields or the Skipped that replaces them).

Fields are a dict; `records.to_record` checks them."""


def natural_key(name: str) -> tuple:
    """A key that sorts names with numbers by the numbers: 2 before 10."""
    parts: list[Any] = _NUMBER.split(name)  # texts and digits in turn
    parts[1::2] = [(len(x.lstrip("0")), x.lstrip("0")) for x in parts[1::2]]
    return parts, name


def files(inputs: Sequence[str], suffixes: tuple[str, ...]) -> list[tuple[epath.Path, str]]:
    """(path, short name) of every input file, in natural order of the paths.

    Files of the same name in several folders are named by as much of their paths as differs.

    Args:
      inputs: files, patterns with `*`, or folders.
      suffixes: which files of a folder are read.
    Raises:
      DataError: an input matches no file.
    """
    names: dict[str, str] = {}
    for name in inputs:
        path = epath.Path(name)
        if path.is_dir():
            matches = {str(p): n for p, n in walk(path) if n.lower().endswith(suffixes)}
        else:
            matches = {str(p): p.name for p in _expand(path)}
        if not matches:
            raise DataError(
                f"{name}: expected a file, a pattern with * or a folder with files "
                f"{', '.join(suffixes)}; it matches no file{_contents(path)}"
            )
        names |= matches
    counts = collections.Counter(names.values())
    if same := [path for path, name in names.items() if counts[name] > 1]:
        common = os.path.commonprefix([path.rpartition("/")[0] + "/" for path in same])
        names |= {path: path[common.rfind("/") + 1 :] for path in same}
    return [(epath.Path(path), names[path]) for path in sorted(names, key=natural_key)]


def _expand(path: epath.Path) -> list[epath.Path]:
    """The path itself if it exists, or what its pattern matches.

    Brackets are part of a name; they are a pattern only if no such name matches.
    """
    if path.exists() or not glob.has_magic(str(path)):
        return [path] if path.exists() else []
    siblings = [p for parent in _expand(path.parent) if parent.is_dir() for p in parent.iterdir()]
    siblings = [p for p in siblings if path.name.startswith(".") or not p.name.startswith(".")]
    literal = glob.escape(path.name).replace("[*]", "*")
    for pattern in (literal, path.name):
        if matches := [p for p in siblings if fnmatch.fnmatchcase(p.name, pattern)]:
            return matches
    return []


def _contents(path: epath.Path) -> str:
    """The suffixes of the files in a folder, for the message; '' for no folder."""
    if not path.is_dir():
        return ""
    suffixes = collections.Counter(epath.Path(name).suffix.lower() for _, name in walk(path))
    counts = [
        f"{count:,} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(5)
    ]
    return f": the folder holds {', '.join(counts) or 'no files'}"


def walk(folder: epath.Path) -> Iterator[tuple[epath.Path, str]]:
    """(path, path relative to the folder) of every file in it, folder by folder, in natural order.

    Names that begin with a dot are left out. Links to folders are followed once.
    """
    stack, visited = [(folder, "")], set()
    while stack:
        current, prefix = stack.pop()
        real = os.path.realpath(current)
        if real in visited:
            continue
        visited.add(real)
        paths = sources.retry(lambda folder=current: list(folder.iterdir()), str(current))
        for path in sorted(paths, key=lambda path: natural_key(path.name)):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                stack.append((path, f"{prefix}{path.name}/"))
            else:
                yield path, prefix + path.name


@contextlib.contextmanager
def open_file(
    path: epath.Path, what: str = "file", broken: tuple[type[Exception], ...] = ()
) -> Iterator[Any]:
    """The file as a stream of bytes; .gz is decompressed.

    Args:
      path: the file.
      what: its name in reasons: image, caption, file.
      broken: errors inside the `with` which mean that the file is broken.
    Raises:
      Skipped: no such file, or a broken one; trying again would not help.
      DataError: the store fails repeatedly when the file is opened.
      OSError: it fails later.
    """
    with sources.retry(lambda: _open(path, what), str(path)) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise Skipped(f"{what}: Git LFS pointer", LFS_HELP)
        file.seek(0)
        try:
            yield gzip.GzipFile(fileobj=file) if path.name.lower().endswith("gz") else file
        except (EOFError, zlib.error, gzip.BadGzipFile, *broken) as e:
            raise Skipped(f"{what}: truncated or broken", str(e)[:160]) from e


def read_bytes(path: epath.Path, what: str, limit: int = -2) -> bytes:
    """The first `limit` + 1 bytes of a file; all without a limit.

    Raises:
      Skipped: as `open_file`.
      DataError: the store fails repeatedly.
    """

    def read() -> bytes:
        with open_file(path, what) as stream:
            return stream.read(limit + 1)

    return sources.retry(read, str(path))


def _open(path: epath.Path, what: str) -> Any:
    if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait
        raise Skipped(f"{what}: not a file", str(path))
    try:
        return path.open("rb")
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        if isinstance(e, (IsADirectoryError, NotADirectoryError)):
            reason = "not a file"
        elif isinstance(e, PermissionError):
            reason = "cannot be read"
        elif isinstance(e, (FileNotFoundError, ValueError)):
            reason = "missing"
        elif e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = "missing"
        else:
            raise
        raise Skipped(f"{what}: {reason}", str(e)) from e


def lines(path: epath.Path, begin: int = 0, end: int = -1) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [begin, end) of a file; .gz is decompressed.

    Of a line above LINE_LIMIT only its begin is in memory: a file need not have lines at all.

    Args:
      path: the file.
      begin, end: offsets. For .gz only 0 and -1 (the end); there offsets count decompressed bytes.
    Raises:
      Skipped: as `open_file`; of a truncated or broken .gz after the lines before the break.
    """
    with open_file(path) as stream:
        offset = begin
        if begin:  # a line that begins before `begin` belongs to the shard before
            stream.seek(begin - 1)
            offset += _read_line(stream)[1] - 1
        elif encoding := wide_encoding(stream):
            yield from _wide_lines(stream, encoding)
            return
        while end < 0 or offset < end:
            line, length = _read_line(stream)
            if not length:
                return
            yield offset, line.rstrip(b"\r\n")
            offset += length


def wide_encoding(stream: Any) -> str:
    """utf-16 or utf-32, whose lines cannot be found as bytes; '' for UTF-8."""
    encoding = text_encoding(stream.read(4))
    stream.seek(0)
    return "" if encoding.startswith("utf-8") else encoding


def _wide_lines(stream: Any, encoding: str) -> Iterator[tuple[int, bytes]]:
    """The lines of such a file in UTF-8; offsets count the bytes of UTF-8."""
    offset, text = 0, io.TextIOWrapper(stream, encoding, newline="\n")
    try:
        for line in text:
            data = line.encode("utf-8", errors="replace")
            yield offset, data.rstrip(b"\r\n")
            offset += len(data)
    except UnicodeError as e:
        raise Skipped("file: truncated or broken", str(e)[:160]) from e
    finally:
        text.detach()  # leaves the stream open, which another closes


def _read_line(stream: Any) -> tuple[bytes, int]:
    """(the begin of the next line, its whole length)."""
    line = last = stream.readline(LINE_LIMIT)
    length = len(line)
    while last and not last.endswith(b"\n"):
        last = stream.readline(2**20)
        length += len(last)
    return line, length


def decode(data: bytes) -> str:
    """The text of a file.

    Bytes that are not UTF-8 stay in their field, where `records.clean_text` reports them.

    Raises:
      Skipped: UTF-16 that is broken.
    """
    encoding = text_encoding(data)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as e:
        raise Skipped("file: not UTF-8", str(e)[:120]) from e


def parse_json(data: bytes) -> Any:
    """The value of JSON, or the Skipped of what is not UTF-8 (or UTF-16) or not JSON."""
    try:
        return json.loads(data)  # which detects UTF-16 and a byte order mark
    except UnicodeDecodeError as e:
        return Skipped("line: not UTF-8", str(e)[:120])
    except (ValueError, RecursionError) as e:
        return Skipped("line: not JSON", str(e)[:120])


def json_rows(path: epath.Path, name: str) -> Iterator[Row]:
    """The elements of a JSON array (.json), or the lines of JSON lines (.jsonl, .jsonl.gz)."""
    try:
        if name.lower().endswith(".json"):
            yield from _json_array(path, name)
            return
        for number, (_, line) in enumerate(lines(path), 1):
            if line.strip():
                yield f"{name}:{number}", f"{name}-{number}", parse_json(line)
    except Skipped as e:
        yield name, "", e


def _json_array(path: epath.Path, name: str) -> Iterator[Row]:
    """The elements one by one, so that those in front of a break are used."""
    text = decode(read_bytes(path, "file"))
    begin = re.match(r"\s*\[", text)
    if not begin:
        raise Skipped("file: not a JSON array", text[:40])
    decoder, offset = json.JSONDecoder(), begin.end()
    for number in itertools.count():
        place = f"{name}[{number}]"
        offset = _SEPARATOR.match(text, offset).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text.startswith("]", offset):
            return
        try:
            value, end = decoder.raw_decode(text, offset)
        except (ValueError, RecursionError) as e:
            yield place, "", Skipped("file: not JSON to its end", str(e)[:120])
            return
        yield place, f"{name}-{number}", value
        offset = end


def write_slices(rows: Iterable[Row], folder: epath.Path, size: int) -> Iterator[dict]:
    """Writes rows to folder/00000.jsonl, ... of `size` rows each; yields a shard for each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = iter(rows)
    for number in itertools.count():
        slice_lines = []
        for where, place_id, value in itertools.islice(rows, size):
            is_skipped = isinstance(value, Skipped)
            rest = [None, value.reason, value.detail] if is_skipped else [value]
            slice_lines.append(json.dumps([where, place_id, *rest]) + "\n")
        if not slice_lines:
            return
        path = folder / f"{number:05}.jsonl"
        path.write_text("".join(slice_lines), encoding="utf-8")
        yield {"slice": str(path)}


def read_slice(path: str) -> Iterator[Row]:
    """The rows of a file that `write_slices` wrote."""
    text = sources.retry(lambda: epath.Path(path).read_text(encoding="utf-8"), path)
    for line in text.splitlines():
        where, place_id, value, *skipped = json.loads(line)
        yield where, place_id, Skipped(*skipped) if skipped else value
