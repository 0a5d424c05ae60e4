"""Paths that a user names, and files and folders that are written whole or not at all."""

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.config.errors import ConfigError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of a bucket's URL -> the package that opens it."""
PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder of the project, which may be read-only and need not be the current one."""
_URL = re.compile(r"([A-Za-z][\w+.-]*):/+(.*)")  # `pathlib` makes one slash of two


def resolve(path: Any) -> epath.Path:
    """A path that a user named: absolute, `~` expanded. The URL of a bucket stays a URL.

    `starts/...` is the project's own where the current folder has none.

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
