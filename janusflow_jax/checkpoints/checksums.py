"""A checksum for every file of a model folder or checkpoint.

In a job of several processes, each computes the checksums of the files that it wrote
(`write_share`, then `merge_shares`); to verify, each reads a share of the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.config.files import LFS_HELP, LFS_POINTER

SUMS_FILE, MARKER = "checksums.json", "COMMITTED"


def read_json(path: epath.Path) -> Any:
    data = b""
    try:
        data = path.read_bytes()
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = LFS_HELP if data.startswith(LFS_POINTER) else error
        raise CheckpointError(f"{path}: expected a JSON file; {reason}") from error


def file_sha256(path: epath.Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _names(folder: epath.Path, below: str = "") -> list[str]:
    """Relative paths of the files below a folder that get a checksum."""
    out = []
    for entry in sorted((folder / below).iterdir()):
        name = f"{below}{entry.name}"
        if entry.is_dir():
            out += _names(folder, f"{name}/")
        elif name not in (MARKER, "README.md") and not re.fullmatch(r"checksums.*\.json", name):
            out.append(name)
    return out


def _sums(folder: epath.Path, names: Sequence[str]) -> dict[str, str]:
    return {n: file_sha256(folder / n) for n in names}


def write_sums(folder: epath.Path) -> None:
    """Writes the checksums of all files below a folder."""
    (folder / SUMS_FILE).write_text(json.dumps(_sums(folder, _names(folder)), indent=0))


def writer_of(name: str) -> int:
    """The process that wrote a file: Orbax has a folder for each process."""
    match = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
    return int(match[1]) if match else 0


def write_share(folder: epath.Path, process: int) -> None:
    """Writes the checksums of one process's files, for `merge_shares`."""
    mine = [n for n in _names(folder) if writer_of(n) == process]
    (folder / _share_file(process)).write_text(json.dumps(_sums(folder, mine), indent=0))


def merge_shares(folder: epath.Path, processes: int) -> None:
    """Merges the shares of all processes into one file, once all are written.

    Raises:
      CheckpointError: a missing share, or a file without a checksum.
    """
    shares = [folder / _share_file(k) for k in range(processes)]
    if absent := [k for k, share in enumerate(shares) if not share.exists()]:
        raise CheckpointError(
            f"{folder}: processes {absent} did not write their part; see their logs"
        )
    sums = {name: value for share in shares for name, value in read_json(share).items()}
    if without := sorted(set(_names(folder)) - set(sums)):
        raise CheckpointError(
            f"{folder}: {without} without a checksum: was the folder written by more than "
            f"{processes} processes, or do they not all see the same files?"
        )
    (folder / SUMS_FILE).write_text(json.dumps(sums, indent=0))
    for share in shares:
        share.unlink()


def _share_file(process: int) -> str:
    return f"checksums.{process}.json"


def damage(
    folder: epath.Path, parts: Sequence[str] | None = None, share: tuple[int, int] = (0, 1)
) -> str:
    """Names missing, changed and unreadable files of a folder; '' if it is undamaged.

    A dying disk does not change files, it fails to read them: that is damage too.

    Args:
      parts: verify only these names directly below the folder; None: all.
      share: (k, n): verify only the k-th of n shares of about equal size.
    """
    try:
        sums = read_json(folder / SUMS_FILE)
        names = [n for n in _names(folder) if parts is None or n.split("/")[0] in parts]
    except (CheckpointError, OSError) as error:
        return str(error)
    if not isinstance(sums, dict):
        return f"{folder / SUMS_FILE}: expected the checksum of each file; got {sums!r:.40}"
    expected = {n for n in sums if parts is None or n.split("/")[0] in parts}
    missing = sorted(expected - set(names))
    present = sorted(expected & set(names), key=lambda n: (-_length(folder / n), n))
    changed, unreadable = [], []
    for name in sorted(present[share[0] :: share[1]]):
        try:
            if file_sha256(folder / name) != sums[name]:
                changed.append(name)
        except OSError as error:
            unreadable.append(f"{name} ({error.strerror or error})")
    problems = {"missing": missing, "changed": changed, "unreadable": unreadable}
    return ", ".join(f"{problem} {names}" for problem, names in problems.items() if names)


def _length(file: epath.Path) -> int:
    """Bytes of a file; 0 where it cannot be read, which `damage` reports later."""
    try:
        return files.size(file)
    except OSError:
        return 0


def verify_sums(folder: epath.Path, parts: Sequence[str] | None = None) -> None:
    """Raises CheckpointError naming every file that is missing or differs from its checksum.

    Args: parts: as in `damage`.
    """
    if report := damage(folder, parts):
        raise CheckpointError(
            f"{folder}: damaged: {report}; restore it from a copy, or use another checkpoint"
        )
