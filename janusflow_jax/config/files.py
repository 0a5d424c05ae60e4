"""Files and folders that are written as a whole or not at all."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

_unfinished: dict[Any, Any] = {}
"""Temporary paths of `replacing`, and the paths that they will replace."""


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
        _unfinished[part] = path
    try:
        with naming(path):
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
            _undo(path, part)
        raise
    finally:
        _unfinished.pop(part, None)


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Adds the path to an OSError that names none: a write to a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def remove_unfinished() -> None:
    """Undoes every `replacing` of this process that has not ended; for a process about to exit."""
    for part, path in list(_unfinished.items()):
        for _ in range(5):  # other threads may still write into the folder
            with contextlib.suppress(OSError):
                _undo(path, part)
                break
            time.sleep(0.1)


def _undo(path: Any, part: Any) -> None:
    old = part.parent / f"{part.name}-old"
    if os.path.isdir(old) and not os.path.exists(path):
        os.rename(old, path)
    remove(part)


def remove(path: Any) -> None:
    """Removes a file or folder, on a disk or in a bucket; does nothing where there is none."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Any, error: Exception) -> None:
    """Renames a file that cannot be used, so that it blocks nothing, and prints a warning."""
    aside = path.parent / f"{path.name}.unreadable"
    remove(aside)
    path.rename(aside)
    print(f"WARNING: {path}: cannot be used ({error}); renamed to {aside.name}", flush=True)
