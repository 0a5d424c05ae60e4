"""Which files an importer reads, and rows written in slices for workers to share."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import sources
from janusflow_jax.data.prepare.raw import Options, Skipped

Entry = tuple[str, str, Any]
"""(file and place, id by place, a row or the Skipped that stands for it)."""


_OF_FILES = (".jpg", ".jpeg", ".png", ".webp", ".txt", ".tar", ".parquet", ".json", ".jsonl", ".gz")


def files(options: Options, suffixes: tuple[str, ...]) -> list[tuple[epath.Path, str]]:
    """(path, short name) of every input file, in order of the names.

    An input is a file, a pattern with `*`, or a folder, whose files of these suffixes are taken.

    Raises:
      DataError: an input that stands for no file (lists all).
    """
    found: dict[str, str] = {}
    problems = []
    for given in options.inputs:
        path = epath.Path(given)
        if "*" in path.name:
            these = [(p, p.name) for p in path.parent.glob(path.name)]
        elif path.is_dir():
            these = [(p, name) for p, name in walk(path) if name.lower().endswith(suffixes)]
        else:
            these = [(path, path.name)] if path.exists() else []
        if not these:
            problems.append(
                f"{given}: expected a file, a pattern with * or a folder with files "
                f"{', '.join(suffixes)}; it stands for none"
            )
        found |= {str(p): name for p, name in these}
    if problems:
        raise DataError("inputs:\n" + "\n".join(f"  - {p}" for p in problems))
    return [(epath.Path(path), found[path]) for path in sorted(found)]


def walk(folder: epath.Path) -> Iterator[tuple[epath.Path, str]]:
    """(path, path relative to the folder) of every file in it, folder by folder, sorted.

    A folder that is named as a file would be (x.jpg) comes too: its name says that a picture is
    missing. Names that begin with a dot are left out. Links to folders are followed, once.
    """
    todo, seen = [(folder, "")], set()
    while todo:
        here, prefix = todo.pop()
        real = str(here) if "://" in str(here) else os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        listed = sources.retry(functools.partial(_listed, here), str(here))
        for path in listed:
            name = prefix + path.name
            if path.name.startswith("."):
                continue
            is_folder = path.is_dir()
            if is_folder:
                todo.append((path, f"{name}/"))
            if not is_folder or path.suffix.lower() in _OF_FILES:
                yield path, name


def _listed(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.iterdir(), key=lambda path: path.name)


def read_bytes(path: epath.Path, what: str, limit: int = -2) -> bytes:
    """The first `limit` + 1 bytes of a file; all without a limit. Raises as `open_file`."""

    def once() -> bytes:
        with _opened(path, what) as stream:
            return stream.read(limit + 1)

    return sources.retry(once, str(path))


def open_file(path: epath.Path, what: str = "file") -> Any:
    """The file as a stream of bytes.

    Args:
      what: names it in reasons: picture, caption, file.
    Raises:
      Skipped: it is not there, or no file: to try again would not help.
      DataError: the store fails again and again.
    """
    return sources.retry(lambda: _opened(path, what), str(path))


def _opened(path: epath.Path, what: str) -> Any:
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


def write_slices(entries: Iterable[Entry], folder: epath.Path, size: int) -> Iterator[dict]:
    """Writes rows to folder/00000.jsonl, ... of `size` rows each; yields a shard for each."""
    lines: list[str] = []
    count = 0

    def flush() -> dict:
        nonlocal count
        path = folder / f"{count:05}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines.clear()
        count += 1
        return {"slice": path.name}

    folder.mkdir(parents=True, exist_ok=True)
    for where, place_id, row in entries:
        if isinstance(row, Skipped):
            lines.append(json.dumps([where, place_id, None, row.reason, row.detail]))
        else:
            lines.append(json.dumps([where, place_id, row]))
        if len(lines) == size:
            yield flush()
    if lines:
        yield flush()


def read_slice(path: epath.Path) -> Iterator[Entry]:
    """The entries of a slice that `write_slices` wrote."""
    text = sources.retry(lambda: path.read_text(encoding="utf-8"), str(path))
    for line in text.splitlines():
        where, place_id, row, *skipped = json.loads(line)
        yield where, place_id, Skipped(*skipped) if skipped else row
