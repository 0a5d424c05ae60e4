"""Paths of users, their text files, and files and folders that are written whole or not at all."""

import codecs
import contextlib
import fnmatch
import functools
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config import lock
from janusflow_jax.config.errors import ConfigError, DataError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of a bucket's URL -> the package that opens it."""
PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder of the project, which may be read-only and need not be the current one."""
_URL = re.compile(r"([A-Za-z][\w+.-]*):/+(.*)")  # `pathlib` makes one slash of two
_unfinished: dict[Any, Any] = {}
"""Temporary paths of `replacing`, and the paths that they will replace."""


def resolve(path: Any) -> epath.Path:
    """A path that a user named: absolute, `~` expanded. The URL of a bucket stays a URL.

    `starts/...` that does not exist in the current folder is the project's own.

    Raises:
      ConfigError: a URL of another kind, or a bucket that cannot be opened.
    """
    name = os.fspath(path)
    url = _URL.fullmatch(name)
    if url is None:
        local = os.path.abspath(os.path.expanduser(name))
        shipped = os.path.join(PROJECT, name)
        if name.startswith("starts/") and not os.path.exists(local) and os.path.exists(shipped):
            return epath.Path(shipped)
        return epath.Path(local)
    scheme, rest = url.groups()
    if scheme not in PACKAGES:
        raise ConfigError(
            f"{name}: expected a path, or a URL that begins with gs://, s3:// or az://; got "
            f"{scheme}://: download it, or mount it as a folder"
        )
    _check_opens(scheme, rest.partition("/")[0])
    return epath.Path(f"{scheme}://{rest}")


@functools.cache
def _check_opens(scheme: str, bucket: str) -> None:
    """Raises ConfigError: the bucket cannot be opened."""
    from fsspec import config as fsspec_config

    # Other processes and Orbax's own writer add files, which a cached listing would lack.
    for name in (scheme, "gcs"):
        fsspec_config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        epath.Path(f"{scheme}://{bucket}/any").stat()
    except FileNotFoundError:
        pass
    except Exception as error:  # each store has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{scheme}://{bucket}: the bucket cannot be opened: {reason}. Expected the package "
            f"{PACKAGES[scheme]} (pip install {PACKAGES[scheme]}), credentials, and the network"
        ) from error


def is_remote(path: Any) -> bool:
    """Whether a path of `resolve` is in a bucket."""
    return "://" in os.fspath(path)


def size(path: Any) -> int:
    """Bytes of a file. `epath`'s own `stat` fails where a file's owner has no name."""
    return path.stat().length if is_remote(path) else os.stat(path).st_size


def problem_of_out(
    out: Any,
    overwrite: bool,
    mark: tuple[str, str],
    made: Sequence[str],
    inputs: Sequence[Any] = (),
    may_lie_inside: bool = False,
) -> str:
    """Why a command must not write the folder `out`; '' if it may.

    A new folder, or one that holds nothing but a lock, is free. Another is replaced only if the
    same command wrote all of it.

    Args:
      mark: a name that only a folder of this command has, and a text in that file ('': any).
      made: patterns of all names that such a folder has.
      inputs: what the command reads; `out` must be apart from each.
      may_lie_inside: `out` may be a folder inside an input, of which the command reads other files.
    """
    target = _real(out)
    for source in map(_real, inputs):
        lies_inside = source in target.parents and not may_lie_inside
        if target == source or target in source.parents or lies_inside:
            return (
                f"{out}: expected a folder apart from the inputs; it equals, contains or lies in "
                f"{source}: choose another"
            )
    if not out.exists() or (out.is_dir() and all(p.name == lock.FILE for p in out.iterdir())):
        return ""
    name, text = mark
    if not (out / name).exists() or (text and text.encode() not in (out / name).read_bytes()):
        return (
            f"{out}: exists with other files; expected a new folder, or one that this command "
            "wrote, because --overwrite would remove them: choose another"
        )
    names = sorted(p.name for p in out.iterdir())
    if others := [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in made)]:
        return (
            f"{out}: exists with other files ({', '.join(others[:8])}) beside those that this "
            "command wrote: choose another, or move them away, because --overwrite would remove "
            "them"
        )
    if not overwrite:
        return f"{out}: exists: choose another folder, or pass --overwrite to replace it"
    return ""


def _real(path: Any) -> pathlib.PurePath:
    """Where a path leads, links followed; a bucket's is what it is."""
    name = os.fspath(resolve(path))
    return pathlib.PurePosixPath(name if is_remote(name) else os.path.realpath(name))


@contextlib.contextmanager
def replacing(path: Any, suffix: str = "", active: bool = True) -> Iterator[Any]:
    """Yields a path beside `path` for a new file or folder, which replaces `path` at the end.

    After an error, or Ctrl-C, `path` is what it was and nothing else is left. The next process on
    the same host removes what a killed one left.

    Args:
      path: a `pathlib.Path` or `epath.Path`.
      suffix: of the temporary name; default: this host and process.
      active: False: only yields the path, because another process replaces `path`.
    """
    if os.path.islink(path):  # what it leads to is replaced, where that is
        path = type(path)(os.path.realpath(path))
    prefix = f".{path.name}.partial-{socket.gethostname()}-"
    part = path.parent / (f".{path.name}.partial-{suffix}" if suffix else f"{prefix}{os.getpid()}")
    old = path.parent / f"{part.name}-old"
    if active:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not suffix:
            _remove_leftovers(path, prefix)
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


def _remove_leftovers(path: Any, prefix: str) -> None:
    """Removes what killed processes left beside `path`, or moves it back to `path`."""
    # A bucket has no empty folders, so there `mkdir` has made none.
    for entry in sorted(path.parent.iterdir()) if path.parent.exists() else ():
        number, _, kind = entry.name.removeprefix(prefix).partition("-")
        if not entry.name.startswith(prefix) or not number.isdigit() or _is_running(int(number)):
            continue
        if kind == "old" and not path.exists():
            entry.rename(path)  # killed between the two renames at the end of `replacing`
        else:
            remove(entry)


def _is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return number != os.getpid()  # an earlier process had this one's number


def remove(path: Any) -> None:
    """Removes a file or folder, on a disk or in a bucket; does nothing where there is none."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    elif path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def copy(source: Any, target: Any) -> None:
    """Copies a folder to where nothing is, on a disk or in a bucket."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            copy(entry, target / entry.name)
        else:
            entry.copy(target / entry.name)


def set_aside(path: Any, error: Exception) -> None:
    """Renames a file that cannot be used, so that it blocks nothing, and prints a warning."""
    aside = path.parent / f"{path.name}.unreadable"
    remove(aside)
    path.rename(aside)
    reason = f"{type(error).__name__}: {error}"
    print(f"WARNING: {path}: cannot be used ({reason}); renamed to {aside.name}", flush=True)


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
    """The encoding that a byte order mark at the start of a file names; without one, UTF-8."""
    return next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8")


def read_lines(path: Any) -> list[str]:
    r"""The lines of a text file, stripped.

    Lines end with \n, \r\n or \r only: `str.splitlines` also divides at characters such as U+2028,
    which occur inside lines.

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
