"""Lines and JSON of files that may be broken, compressed or without end."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data.prepare import inputs
from janusflow_jax.data.prepare.raw import Skipped

BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a truncated or broken .gz raises."""


def parse(line: bytes | str) -> Any:
    """JSON of a line.

    Raises:
      Skipped: not UTF-8, not JSON.
    """
    try:
        return json.loads(line.decode("utf-8") if isinstance(line, bytes) else line)
    except UnicodeDecodeError as e:
        raise Skipped("line: not UTF-8", str(e)[:120]) from e
    except (ValueError, RecursionError) as e:
        raise Skipped("line: not JSON", str(e)[:120]) from e


def lines(
    path: epath.Path, begin: int = 0, end: int = -1, limit: int = 2**28
) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [begin, end) of a file; .gz is unpacked.

    Args:
      path: the file.
      begin, end: offsets; only 0 and -1 (the end) for .gz, where offsets count unpacked bytes.
      limit: bytes of a line that are kept; of a longer one the first `limit` + 1 come, no more.
    Raises:
      BROKEN: a .gz that is truncated or broken; the lines before it have come.
      Skipped, DataError: as `inputs.open_file`.
    """
    with inputs.open_file(path) as stream:
        unpacked: Any = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
        at = begin
        if begin:  # the line that begins before `begin` is another's
            unpacked.seek(begin - 1)
            at += _line(unpacked, 0)[1] - 1
        while end < 0 or at < end:
            line, length = _line(unpacked, limit)
            if not length:
                return
            yield at, line.rstrip(b"\r\n")
            at += length


def array(text: str) -> Iterator[tuple[int, Any | Skipped]]:
    """(offset, element or what is wrong) of a JSON array.

    Behind a broken place it goes on with the next object that begins as the first one does.
    """
    decoder = json.JSONDecoder()
    begins: re.Pattern[str] | None = None
    space = re.compile(r"[\s,]*")
    opened = re.match(r"\s*\[", text)
    if not opened:
        yield 0, Skipped("file: not a JSON array", text[:40])
        return
    at = opened.end()
    while True:
        at = space.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text.startswith("]", at):
            return
        if at >= len(text):
            yield at, Skipped("file: not JSON to its end", "the array does not end")
            return
        try:
            element, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield at, Skipped("file: not JSON to its end", str(e)[:120])
            found = begins.search(text, at + 1) if begins else None
            if not found:
                return
            at = found.start()
            continue
        if begins is None and isinstance(element, dict) and element:
            begins = re.compile(r"\{\s*" + re.escape(json.dumps(next(iter(element)))) + r"\s*:")
        yield at, element
        at = end


def _line(stream: Any, limit: int) -> tuple[bytes, int]:
    """(what is kept of the next line, its length in the file)."""
    line = stream.readline(limit + 1)
    length, last = len(line), line
    while last and not last.endswith(b"\n"):
        last = stream.readline(2**20)
        length += len(last)
    return line, length
