"""Input files -> rows: listing, opening, and lines and JSON of files that may be broken."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import sources

BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a truncated or broken .gz raises."""
BOM = b"\xef\xbb\xbf"
"""The mark that some editors write at the begin of a UTF-8 file."""
_DATA_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".txt"),
    *(".tar", ".parquet", ".json", ".jsonl", ".gz"),
)


class Skipped(Exception):
    """A row or a file that cannot be used. The run continues and counts it.

    Attributes:
      reason: one of few; a key of report.json.
      detail: what was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


Row = tuple[str, str, Any]
"""(place for the report, id made of the place, value or the Skipped that replaces it)."""


def files(inputs: Sequence[str], suffixes: tuple[str, ...]) -> list[tuple[epath.Path, str]]:
    """(path, short name) of every input file, in order of the paths.

    Args:
      inputs: files, patterns with `*`, or folders.
      suffixes: which files of a folder are read.
    Raises:
      DataError: inputs that match no file (lists all).
    """
    names: dict[str, str] = {}
    problems = []
    for name in inputs:
        path = epath.Path(name)
        if "*" in path.name:
            matches = [(p, p.name) for p in path.parent.glob(path.name)]
        elif path.is_dir():
            matches = [(p, n) for p, n in walk(path) if n.lower().endswith(suffixes)]
        else:
            matches = [(path, path.name)] if path.exists() else []
        if not matches:
            problems.append(
                f"  - {name}: expected a file, a pattern with * or a folder with files "
                f"{', '.join(suffixes)}; it matches no file"
            )
        names |= {str(p): n for p, n in matches}
    if problems:
        raise DataError("\n".join(["inputs:", *problems]))
    return [(epath.Path(path), names[path]) for path in sorted(names)]


def whole_files(suffixes: tuple[str, ...]) -> Callable[[Any, epath.Path], Iterator[dict]]:
    """A plan (see `build.Format`) with one shard a file."""

    def plan(options: Any, slices: epath.Path) -> Iterator[dict]:
        del slices
        for path, name in files(options.inputs, suffixes):
            yield {"path": str(path), "name": name}

    return plan


def walk(folder: epath.Path) -> Iterator[tuple[epath.Path, str]]:
    """(path, path relative to the folder) of every file in it, folder by folder, sorted.

    Names that begin with a dot are left out. Links to folders are followed once. A folder that is
    named like a data file (x.jpg) comes too, so that the report names it.
    """
    stack, visited = [(folder, "")], set()
    while stack:
        current, prefix = stack.pop()
        real = str(current) if "://" in str(current) else os.path.realpath(current)
        if real in visited:
            continue
        visited.add(real)
        paths = sources.retry(lambda folder=current: list(folder.iterdir()), str(current))
        for path in sorted(paths, key=lambda path: path.name):
            if path.name.startswith("."):
                continue
            is_folder = path.is_dir()
            if is_folder:
                stack.append((path, f"{prefix}{path.name}/"))
            if not is_folder or path.suffix.lower() in _DATA_SUFFIXES:
                yield path, prefix + path.name


def open_file(path: epath.Path, what: str = "file") -> Any:
    """The file as a stream of bytes.

    Args:
      path: the file.
      what: its name in reasons: picture, caption, file.
    Raises:
      Skipped: no such file; trying again would not help.
      DataError: the store fails repeatedly.
    """
    return sources.retry(lambda: _open(path, what), str(path))


def read_bytes(path: epath.Path, what: str, limit: int = -2) -> bytes:
    """The first `limit` + 1 bytes of a file; all without a limit. Raises as `open_file`."""

    def read() -> bytes:
        with _open(path, what) as stream:
            return stream.read(limit + 1)

    return sources.retry(read, str(path))


def _open(path: epath.Path, what: str) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError as e:
        raise Skipped(f"{what}: missing", f"no file {path}") from e
    except (IsADirectoryError, NotADirectoryError) as e:
        raise Skipped(f"{what}: not a file", str(path)) from e
    except PermissionError as e:
        raise Skipped(f"{what}: cannot be read", str(e)) from e
    except OSError as e:
        if e.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise Skipped(f"{what}: missing", str(e)) from e


def lines(
    path: epath.Path, begin: int = 0, end: int = -1, limit: int = 2**28
) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [begin, end) of a file; .gz is decompressed.

    Args:
      path: the file.
      begin, end: offsets. For .gz only 0 and -1 (the end); there offsets count decompressed bytes.
      limit: of a line with more bytes, only the first `limit` + 1 are returned.
    Raises:
      BROKEN: a truncated or broken .gz, after the lines before the break.
      Skipped, DataError: as `open_file`.
    """
    with open_file(path) as file:
        stream: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        offset = begin
        if begin:  # a line that begins before `begin` belongs to the shard before
            stream.seek(begin - 1)
            offset += _read_line(stream, 0)[1] - 1
        while end < 0 or offset < end:
            line, length = _read_line(stream, limit)
            if not length:
                return
            yield offset, line.rstrip(b"\r\n")
            offset += length


def _read_line(stream: Any, limit: int) -> tuple[bytes, int]:
    """(the first `limit` + 1 bytes of the next line, its whole length)."""
    line = stream.readline(limit + 1)
    length, last = len(line), line
    while last and not last.endswith(b"\n"):
        last = stream.readline(2**20)
        length += len(last)
    return line, length


def parse_json(line: bytes) -> Any:
    """The value of a line of JSON.

    Raises:
      Skipped: not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as e:
        raise Skipped("line: not UTF-8", str(e)[:120]) from e
    except (ValueError, RecursionError) as e:
        raise Skipped("line: not JSON", str(e)[:120]) from e


def json_lines(path: epath.Path, name: str) -> Iterator[Row]:
    """The rows of a JSON-lines file (.gz too)."""
    number = 0
    try:
        for number, (_, line) in enumerate(lines(path), 1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except Skipped as e:
                value = e
            yield f"{name}:{number}", f"{name}-{number}", value
    except BROKEN as e:
        yield f"{name}:{number + 1}", "", Skipped("file: truncated or broken", str(e))
    except Skipped as e:
        yield name, "", e


def json_array(path: epath.Path, name: str) -> Iterator[Row]:
    """The elements of a file that holds one JSON array."""
    try:
        data = read_bytes(path, "file").removeprefix(BOM)
    except Skipped as e:
        yield name, "", e
        return
    if not data.strip():
        yield name, name, Skipped("file: empty")
        return
    # bytes that are not UTF-8 stay in their text, where `records.clean_text` reports them
    text = data.decode("utf-8", errors="surrogateescape")
    for number, (offset, value) in enumerate(_elements(text)):
        yield f"{name}@{offset}", f"{name}-{number}", value


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """(offset, element or Skipped) of a JSON array.

    After a broken element it continues at the next object that begins as the first one did.
    """
    decoder = json.JSONDecoder()
    first_key: re.Pattern[str] | None = None
    separator = re.compile(r"[\s,]*")
    bracket = re.match(r"\s*\[", text)
    if not bracket:
        yield 0, Skipped("file: not a JSON array", text[:40])
        return
    offset = bracket.end()
    while True:
        offset = separator.match(text, offset).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text.startswith("]", offset):
            return
        if offset >= len(text):
            yield offset, Skipped("file: not JSON to its end", "the array does not end")
            return
        try:
            element, end = decoder.raw_decode(text, offset)
        except (ValueError, RecursionError) as e:
            yield offset, Skipped("file: not JSON to its end", str(e)[:120])
            match = first_key.search(text, offset + 1) if first_key else None
            if not match:
                return
            offset = match.start()
            continue
        if first_key is None and isinstance(element, dict) and element:
            key = re.escape(json.dumps(next(iter(element))))
            first_key = re.compile(r"\{\s*" + key + r"\s*:")
        yield offset, element
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
        yield {"slice": path.name}


def read_slice(path: epath.Path) -> Iterator[Row]:
    """The rows of a file that `write_slices` wrote."""
    text = sources.retry(lambda: path.read_text(encoding="utf-8"), str(path))
    for line in text.splitlines():
        where, place_id, value, *skipped = json.loads(line)
        yield where, place_id, Skipped(*skipped) if skipped else value
