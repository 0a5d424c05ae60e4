"""What model folders and checkpoints have in common: JSON, a checksum of every file, the error."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from etils import epath

SUMS_FILE, MARKER = "checksums.json", "COMMITTED"


class CheckpointError(ValueError):
    """Nothing there that loads, or not what was expected; says what to do."""


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


def _sums(folder: epath.Path, below: str = "") -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    out = {}
    for entry in sorted((folder / below).iterdir()):
        name = f"{below}{entry.name}"
        if entry.is_dir():
            out |= _sums(folder, f"{name}/")
        elif name not in (SUMS_FILE, MARKER, "README.md"):
            out[name] = file_sha256(entry)
    return out


def write_sums(folder: epath.Path) -> None:
    (folder / SUMS_FILE).write_text(json.dumps(_sums(folder), indent=0))


def verify_sums(folder: epath.Path) -> None:
    """Raises CheckpointError naming every file that is missing or differs from its checksum."""
    want, have = read_json(folder / SUMS_FILE), _sums(folder)
    missing = sorted(want.keys() - have)
    changed = sorted(n for n in want.keys() & have if want[n] != have[n])
    if missing or changed:
        raise CheckpointError(
            f"{folder}: damaged: missing {missing}, changed {changed}; restore the folder from a "
            "copy, or use another checkpoint"
        )
