"""What model folders and checkpoints have in common: JSON, a checksum of every file, the error.

A checkpoint of several processes is summed by all of them, each what it wrote itself
(`write_share`, then `merge_shares`), and verified by all, each a share.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from janusflow_jax.config.errors import CheckpointError

SUMS_FILE, MARKER = "checksums.json", "COMMITTED"


def read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON file; {error}") from error


def file_sha256(path: epath.Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _names(folder: epath.Path, below: str = "") -> list[str]:
    """Every file below a folder that has a checksum, by relative path."""
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
    """The process that wrote a file: Orbax keeps what a process writes in a folder of its own."""
    found = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
    return int(found[1]) if found else 0


def write_share(folder: epath.Path, process: int) -> None:
    """Writes the checksums of what one process wrote, for `merge_shares`."""
    mine = [n for n in _names(folder) if writer_of(n) == process]
    (folder / _share_file(process)).write_text(json.dumps(_sums(folder, mine), indent=0))


def merge_shares(folder: epath.Path, processes: int) -> None:
    """Makes one file of the shares of all processes, when all of them have been written.

    Raises:
      CheckpointError: a share that is not there, or a file that nobody summed.
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
    """What is wrong with a folder's files: '' when nothing is.

    Args:
      parts: names right below the folder to which this is limited; None: all.
      share: (k, n): reads only the k-th of n shares, of about the same size.
    """
    try:
        want = read_json(folder / SUMS_FILE)
        names = [n for n in _names(folder) if parts is None or n.split("/")[0] in parts]
    except (CheckpointError, OSError) as error:
        return str(error)
    wanted = {n for n in want if parts is None or n.split("/")[0] in parts}
    missing = sorted(wanted - set(names))
    there = sorted(wanted & set(names), key=lambda n: (-(folder / n).stat().length, n))
    mine = there[share[0] :: share[1]]
    changed = sorted(n for n, value in _sums(folder, mine).items() if value != want[n])
    return f"missing {missing}, changed {changed}" if missing or changed else ""


def verify_sums(folder: epath.Path, parts: Sequence[str] | None = None) -> None:
    """Raises CheckpointError naming every file that is missing or differs from its checksum.

    Args: parts: as in `damage`.
    """
    if found := damage(folder, parts):
        raise CheckpointError(
            f"{folder}: damaged: {found}; restore the folder from a copy, or use another checkpoint"
        )
