"""Files and folders that are written as a whole or not at all; text files that people write."""

import codecs
import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

from janusflow_jax.config.errors import DataError


@contextlib.contextmanager
def replacing(path: Any, suffix: str = "", active: bool = True) -> Iterator[Any]:
    """Yields a path beside `path` for a new file or folder, which replaces `path` at the end.

    After an error, or Ctrl-C, `path` is what it was and nothing else is left.

    Args:
      path: a `pathlib.Path` or `epath.Path`.
      suffix: of the temporary name; default: this process's number.
      active: False: only yields the path, because another process replaces `path`.
    """
    part = path.parent / f".{path.name}.partial-{suffix or os.getpid()}"
    old = path.parent / f"{part.name}-old"
    if active:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
    try:
        yield part
        if active:
            if os.path.isdir(path):  # a rename replaces a file, but not a folder
                os.rename(path, old)
            elif part.is_dir():
                remove(path)
            part.replace(path)
            if os.path.isdir(old):
                remove(old)
    except BaseException:
        if active:
            if os.path.isdir(old) and not os.path.exists(path):
                os.rename(old, path)
            remove(part)
        raise


def remove(path: Any) -> None:
    """Removes a file or folder, on a disk or in a bucket; does nothing where there is none."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not downloaded."""
LFS_HELP = "it is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_encoding(data: bytes) -> str:
    """The encoding that a byte order mark at the begin of a file names; without one, UTF-8."""
    return next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8")


def read_lines(path: Any) -> list[str]:
    r"""The lines of a text file, stripped.

    Lines end with \n, \r\n or \r only: `str.splitlines` also divides at characters such as U+2028,
    which people have inside a line.

    Args: path: a `pathlib.Path` or `epath.Path`.
    Raises:
      DataError: the file is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise DataError(f"{path}: {LFS_HELP}")
    try:
        text = data.decode(text_encoding(data))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected a text file in UTF-8; got another encoding ({error.reason} at byte "
            f"{error.start}): save it as UTF-8"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return [line.strip() for line in text.split("\n")] if text else []
