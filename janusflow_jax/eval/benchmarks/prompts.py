"""Reads the prompts of the benchmarks for generation, in the form in which they are published."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PER_CATEGORY = 1000  # of mjhq-fid10k


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark."""

    id: str  # the name of its files
    text: str
    number: int  # its place in the data; seeds count from it
    record: dict[str, Any]  # all that the data say of it


def read(name: str, path: Any, limit: int = 0) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts of a benchmark.

    Args:
      name: of the benchmark.
      path: its data file, or the folder that holds it.
      limit: only so many; 0: all.
    Returns:
      prompts in the order of the data; what was read: `sha256`, and `rows` in the data.
    Raises:
      DataError: no such data, or data that are not as published.
    """
    path = files.resolve(path)
    if not path.exists():
        raise DataError(
            f"--data: expected the data of {name}; there is no {path}: correct the path"
        )
    rows, sha256 = _READERS[name](path)
    _check(path, rows)
    prompts = [Prompt(i, text.strip(), n, record) for n, (i, text, record) in enumerate(rows)]
    if name == "mjhq-fid10k":
        prompts = _smallest_per_category(prompts)
    return prompts[:limit] if limit else prompts, {"sha256": sha256, "rows": len(rows)}


_Row = tuple[str, Any, dict[str, Any]]  # id, text, record


def _check(path: epath.Path, rows: list[_Row]) -> None:
    """Raises DataError: there is no prompt, one is empty, or an id is doubled or no file name."""
    if not rows:
        raise DataError(f"{path}: expected prompts; got none: choose the benchmark's data")
    for number, (name, text, _) in enumerate(rows):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}: row {number}: expected a prompt; got {text!r}: correct it")
        if not _ID.fullmatch(name):
            raise DataError(
                f"{path}: row {number}: expected an id of letters, digits, '_', '-' and '.'; got "
                f"{name!r}: correct it"
            )
    name, count = Counter(name for name, _, _ in rows).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: expected each id once; got {name!r} {count} times: remove copies")


def _geneval(path: epath.Path) -> tuple[list[_Row], str]:
    """Lines of JSON; the line number is the id."""
    file = path / "evaluation_metadata.jsonl" if path.is_dir() else path
    records = json_lines(file, "prompt", "tag", "include")
    return _numbered(records), checksums.file_sha256(file)


def _geneval2(path: epath.Path) -> tuple[list[_Row], str]:
    """Lines of JSON; the line number is the id. The official script finds images by prompt."""
    file = path / "geneval2_data.jsonl" if path.is_dir() else path
    records = json_lines(file, "prompt")
    if len({x["prompt"] for x in records}) < len(records):
        raise DataError(f"{file}: expected each prompt once; got some twice: remove the copies")
    return _numbered(records), checksums.file_sha256(file)


def _dpg(path: epath.Path) -> tuple[list[_Row], str]:
    """A folder of text files; the name without .txt is the id. The hash covers names and bytes."""
    names = sorted(x.name for x in path.iterdir() if x.suffix == ".txt") if path.is_dir() else []
    total, rows = hashlib.sha256(), []
    for name in names:
        data = (path / name).read_bytes()
        total.update(name.encode() + b"\0" + data)
        key = name.removesuffix(".txt")
        if "." in key:  # the official script cuts names at the first period
            raise DataError(f"{path / name}: expected no period in the name; got one: rename it")
        rows.append((key, "\n".join(files.read_lines(path / name)), {}))
    if not rows:
        raise DataError(f"{path}: expected the folder of DPG-Bench's prompts, *.txt; got none")
    return rows, total.hexdigest()


def _mjhq(path: epath.Path) -> tuple[list[_Row], str]:
    """One JSON object, id -> {'category', 'prompt'}."""
    file = path / "meta_data.json" if path.is_dir() else path
    rows: list[_Row] = []
    for key, record in _json(file, dict).items():
        category = str(record.get("category", "")) if isinstance(record, dict) else ""
        if not _ID.fullmatch(category):
            raise DataError(f"{file}: {key}: expected 'category' and 'prompt'; got {record!r:.80}")
        rows.append((key, record.get("prompt"), record))
    return rows, checksums.file_sha256(file)


def _wise(path: epath.Path) -> tuple[list[_Row], str]:
    """A JSON list, or a folder of them, of objects with 'prompt_id' and 'Prompt'."""
    chosen = sorted(path.glob("*.json"), key=lambda x: x.name) if path.is_dir() else [path]
    total, rows = hashlib.sha256(), []
    for file in chosen:
        total.update(file.read_bytes())
        for record in _records(_json(file, list), file, "prompt_id", "Prompt"):
            rows.append((str(record["prompt_id"]), record["Prompt"], record))
    return sorted(rows, key=lambda row: (len(row[0]), row[0])), total.hexdigest()


_READERS = {
    "geneval": _geneval,
    "geneval2": _geneval2,
    "dpg": _dpg,
    "mjhq-fid30k": _mjhq,
    "mjhq-fid10k": _mjhq,
    "wise": _wise,
}


def _smallest_per_category(prompts: list[Prompt]) -> list[Prompt]:
    """Of each category the 1,000 prompts whose ids have the smallest SHA-256.

    The paper does not say which 10,000 it took.
    """
    order = sorted(prompts, key=lambda p: hashlib.sha256(p.id.encode()).hexdigest())
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in order:
        category = prompt.record["category"]
        if taken[category] < _PER_CATEGORY:
            taken[category] += 1
            chosen.append(prompt)
    return sorted(chosen, key=lambda p: p.number)


def _numbered(records: list[dict[str, Any]]) -> list[_Row]:
    return [(f"{n:05d}", record["prompt"], record) for n, record in enumerate(records)]


def json_lines(file: epath.Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a file with one a line, each with these keys.

    Raises:
      DataError: a line that is not such an object.
    """
    out = []
    for number, line in enumerate(files.read_lines(file), 1):
        try:
            out.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{file}: line {number}: expected JSON; {error}") from error
    return list(_records(out, file, *keys))


def _json(file: epath.Path, kind: type) -> Any:
    try:
        value = json.loads("\n".join(files.read_lines(file)))
    except ValueError as error:
        raise DataError(f"{file}: expected JSON; {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{file}: expected a JSON {kind.__name__}; got {type(value).__name__}")
    return value


def _records(values: list[Any], file: epath.Path, *keys: str) -> Iterable[dict[str, Any]]:
    for number, value in enumerate(values):
        if not isinstance(value, dict) or not {*keys} <= value.keys():
            raise DataError(f"{file}: row {number}: expected {', '.join(keys)}; got {value!r:.80}")
        yield value
