"""Builds a data set: plans its shards, makes each on its own, puts them together at the end.

    OUT/.prepare_data/plan.json      options and shards; a run with other options is refused
    OUT/.prepare_data/000012.json    shard 12 is done: its report
    OUT/.prepare_data/000012-*       its records by split, ids, lengths
    OUT/                             the data set; dataset_info.json comes last

A shard depends on its inputs and the options only, and its files are written whole or not at all.
So a killed run resumes, and any worker may make a shard, even twice. Duplicates are removed when
all shards are there: the first in the order of the shards stays.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, packing, samples
from janusflow_jax.data.prepare import (
    engines,
    files,
    folder,
    inputs,
    llava,
    parquet,
    records,
    text,
    webdataset,
)
from janusflow_jax.data.prepare.inputs import Skipped
from janusflow_jax.data.prepare.records import SPLITS, Options
from janusflow_jax.data.prepare.report import Report
from janusflow_jax.data.sources import write_whole


class Format(NamedTuple):
    """How data of a format is read.

    plan(options, slices) -> shards, in a fixed order. A shard is a dict that JSON can hold;
      `slices` is a folder for rows that the plan has read (`inputs.write_slices`).
    read(shard, options, slices) -> items of one shard, in their order.
    kinds: what its records can be; the first is the default.
    """

    plan: Callable[[Options, epath.Path], Iterable[dict]]
    read: Callable[[dict, Options, epath.Path], Iterator[records.Item]]
    kinds: tuple[str, ...]


FORMATS = {
    "folder": Format(folder.plan, folder.read, ("captions", "conversation", "document")),
    "webdataset": Format(
        inputs.whole_files(webdataset.SUFFIXES),
        webdataset.read,
        ("captions", "conversation", "document"),
    ),
    "parquet": Format(parquet.plan, parquet.read, records.KINDS),
    "llava": Format(llava.plan, llava.read, ("conversation",)),
    "text": Format(text.plan, text.read, ("text",)),
}
WORK_FOLDER = ".prepare_data"
"""In OUT, holds what is not yet a data set."""
_MERGE_BYTES = 2**26
"""Smaller shards are merged up to about this size."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to make."""

    out: str
    number: int
    shard: dict
    options: Options

    def file(self, name: str) -> epath.Path:
        return epath.Path(self.out) / WORK_FOLDER / f"{self.number:06}{name}"


class Record(NamedTuple):
    """A record as `data/samples.py` reads it, and its captions that cannot be used."""

    fields: dict[str, Any]
    dropped: list[Skipped]


def prepare(
    options: Options,
    out: epath.PathLike,
    engine: engines.Engine,
    progress: Callable[[int, int, int, int], None] = lambda *_: None,
    overwrite: bool = False,
) -> Report:
    """Makes the data set, or resumes an unfinished run.

    Args:
      options: what to read and how.
      out: folder to make.
      engine: runs the shards.
      progress: called with (shards done, shards, records, skipped).
      overwrite: start again if `out` holds a data set or an unfinished run of this function.
    Raises:
      DataError: `out` holds something else, or no record can be used.
    """
    path = epath.Path(out)
    _check_out(path, overwrite)
    _chat(options.tokenizer)  # fails before the work if it cannot be loaded
    jobs = _jobs(options, path)
    todo = [job for job in jobs if not job.file(".json").exists()]
    done, num_records, num_skipped = len(jobs) - len(todo), 0, 0
    progress(done, len(jobs), 0, 0)
    for counts in engine(run_shard, todo):
        done += 1
        if counts:  # Beam returns none
            num_records, num_skipped = num_records + counts[0], num_skipped + counts[1]
        progress(done, len(jobs), num_records, num_skipped)
    return _assemble(options, path, jobs, engine)


def read_all(options: Options) -> Iterator[tuple[str, Record | Skipped]]:
    """All records of the inputs, for a preview; nothing is written."""
    with tempfile.TemporaryDirectory() as scratch:
        slices = epath.Path(scratch) / WORK_FOLDER / "slices"
        for i, shard in enumerate(FORMATS[options.format].plan(options, slices)):
            yield from read_shard(Job(scratch, i, shard, options))


def read_shard(job: Job) -> Iterator[tuple[str, Record | Skipped]]:
    """(place, record or why there is none) of a shard."""
    slices = epath.Path(job.out) / WORK_FOLDER / "slices"
    for where, raw in FORMATS[job.options.format].read(job.shard, job.options, slices):
        try:
            if isinstance(raw, Skipped):
                raise raw
            yield where, Record(*records.to_record(raw, job.options))
        except Skipped as e:
            yield where, e


def run_shard(job: Job) -> tuple[int, int]:
    """Makes the files of a shard, unless they are there; (records, skipped).

    Engines run this and `files.merge` on their workers, nothing else.
    """
    done = job.file(".json")
    if done.exists():
        return 0, 0
    report, index = Report(), _Index(job.options)
    serialize = files.Serializer(job.options.kind)
    writers: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for where, record in read_shard(job):
            if isinstance(record, Skipped):
                report.skip(where, record)
                continue
            try:
                units = index.measure(record.fields)
            except DataError as e:
                report.skip(where, Skipped("sample: none", str(e)))
                continue
            for caption in record.dropped:
                report.drop_caption(where, caption)
            record_id = record.fields["id"]
            split = records.split_of(record_id, job.options.heldout)
            if split not in writers:
                path = job.file(f"-{split}.array_record")
                writers[split] = stack.enter_context(files.writer(path))
            data = serialize(record.fields)
            writers[split].write(data)
            index.add(split, where, record_id, len(data), units)
            report.records[split] = report.records.get(split, 0) + 1
    index.save(job)
    write_whole(done, json.dumps(report.to_json()).encode())
    return report.num_records, report.num_skipped


class _Index:
    """What the assembly needs to know of the records of a shard: places, ids, sizes, lengths."""

    def __init__(self, options: Options):
        self.specs = [tuple(spec.split(":")) for spec in options.lengths]
        self.chat = _chat(options.tokenizer)
        self.rows: list[tuple[bytes, int, int, int]] = []  # place, hash of the id, size, split
        self.units: dict[tuple, list] = collections.defaultdict(list)  # by split, task, form
        self.is_text: dict[tuple, list[bool]] = collections.defaultdict(list)

    def measure(self, record: dict[str, Any]) -> list[tuple[list[samples.Unit], bool]]:
        """Units for each task and form. Raises DataError: the record makes no sample."""
        if self.chat is None:
            return []
        return [
            (samples.units(record, task, form, self.chat), samples.kind(record, task) == "text")
            for task, form in self.specs
        ]

    def add(self, split: str, where: str, record_id: str, size: int, units: list) -> None:
        hashed = records.hash64(record_id, "id")
        self.rows.append((where.encode(errors="replace"), hashed, size, SPLITS.index(split)))
        for spec, (record_units, is_text) in zip(self.specs, units, strict=bool(units)):
            self.units[split, *spec].append(record_units)
            self.is_text[split, *spec].append(is_text)

    def save(self, job: Job) -> None:
        where, hashes, sizes, splits = zip(*self.rows, strict=True) if self.rows else [()] * 4
        files.save_arrays(
            job.file("-ids.npz"),
            where=np.array(where, np.bytes_),
            hash=np.array(hashes, np.uint64),
            size=np.array(sizes, np.int64),
            split=np.array(splits, np.uint8),
        )
        for key, units in self.units.items():
            measured = packing.lengths_of_units(units, np.array(self.is_text[key], bool))
            files.save_arrays(job.file(f"-{'-'.join(key)}.npz"), **measured._asdict())


@functools.lru_cache(maxsize=2)
def _chat(tokenizer: str) -> chat_format.ChatFormat | None:
    """For lengths, which do not depend on the number of positions of an image."""
    return chat_format.ChatFormat.load(tokenizer, num_image_tokens=1) if tokenizer else None


def _check_out(out: epath.Path, overwrite: bool) -> None:
    info, work = out / "dataset_info.json", out / WORK_FOLDER
    is_whole, is_begun = info.exists(), work.exists()
    is_ours = files.MODULE_NAME in info.read_text() if is_whole else is_begun
    if overwrite and is_ours:
        out.rmtree()
    elif is_whole:
        if is_begun and is_ours:  # stopped between the data set and the clean-up
            work.rmtree()
        raise DataError(
            f"{out}: expected no data set; it holds one: choose another `out`, or set `overwrite` "
            "to make it again (only if it was prepared by this tool)"
        )
    elif out.exists() and not is_ours and any(out.iterdir()):
        raise DataError(f"{out}: expected an empty or new folder; it holds other files")


def _jobs(options: Options, out: epath.Path) -> list[Job]:
    """The shards of the plan, which is made if there is none."""
    work = out / WORK_FOLDER
    path, wanted = work / "plan.json", json.loads(json.dumps(dataclasses.asdict(options)))
    if path.exists():
        plan = json.loads(path.read_text())
        stored = {"format": plan["options"].get("form")} | plan["options"]  # its name in 0.1.0
        changed = [name for name, value in wanted.items() if stored.get(name) != value]
        changed += [p for p, size in plan["sizes"].items() if _size(p) != size]
        if changed:
            raise DataError(
                f"{out}: expected the options and inputs of the unfinished run; these differ: "
                f"{', '.join(changed)}: restore them to resume, or set `overwrite` to start again"
            )
        shards = plan["shards"]
    else:
        work.mkdir(parents=True, exist_ok=True)
        shards = list(FORMATS[options.format].plan(options, work / "slices"))
        sizes = {shard["path"]: _size(shard["path"]) for shard in shards if "path" in shard}
        plan = {"options": wanted, "sizes": sizes, "shards": shards}
        write_whole(path, json.dumps(plan).encode())
    return [Job(str(out), i, shard, options) for i, shard in enumerate(shards)]


def _size(name: str) -> int:
    path = epath.Path(name)
    return path.stat().length if path.exists() else -1


def _assemble(options: Options, out: epath.Path, jobs: list[Job], engine: engines.Engine) -> Report:
    """Removes duplicates, merges small files, stores lengths, writes report and description."""
    report = Report.total(json.loads(job.file(".json").read_text()) for job in jobs)
    unique = _unique_ids(jobs, report)
    if not report.num_records:
        (out / WORK_FOLDER).rmtree()
        raise DataError(f"{out}: no record can be used:\n{report.table()}")
    shards, num_bytes, merges = {}, {}, []
    for index, split in enumerate(SPLITS):
        parts = [
            (job, keep[splits == index], sizes[splits == index])
            for job, (keep, splits, sizes) in zip(jobs, unique, strict=True)
        ]
        parts = [part for part in parts if part[1].any()]
        if not parts:
            continue
        groups = _groups(parts)
        for i, group in enumerate(groups):
            sources = [
                (str(job.file(f"-{split}.array_record")), keep.tolist()) for job, keep, _ in group
            ]
            merges.append((str(out / files.shard_name(split, i, len(groups))), sources))
        shards[split] = [int(sum(keep.sum() for _, keep, _ in group)) for group in groups]
        num_bytes[split] = int(sum(sizes[keep].sum() for _, keep, sizes in parts))
        _store_lengths(options, out, split, parts)
    for _ in engine(files.merge, merges):
        pass
    content = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    write_whole(out / "report.json", (content + "\n").encode("utf-8", "replace"))
    description = f"Prepared by tools/prepare_data.py from data in the form {options.format}."
    files.describe(out, options.kind, shards, num_bytes, description)
    (out / WORK_FOLDER).rmtree()
    return report


Part = tuple[Job, np.ndarray, np.ndarray]
"""(shard, bool[n]: which of its records stay, int64[n]: their sizes) of one split."""


def _unique_ids(jobs: list[Job], report: Report) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(whether it stays, split, size) of the records of every shard; the report gets duplicates.

    Ids are compared by 64 bits of a hash. For 100 million records, one of 3,700 data sets loses a
    good record to a collision.
    """
    names = ("hash", "split", "size")
    columns = [files.load_arrays(job.file("-ids.npz"), *names) for job in jobs]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(c[0] for c in columns)])
    keep = np.zeros(len(hashes), bool)
    keep[np.unique(hashes, return_index=True)[1]] = True  # the first of each
    ends = np.cumsum([len(c[0]) for c in columns])
    out = []
    for job, end, (hashed, splits, sizes) in zip(jobs, ends, columns, strict=True):
        own = keep[end - len(hashed) : end]
        if not own.all():
            (where,) = files.load_arrays(job.file("-ids.npz"), "where")
            for i in np.flatnonzero(~own):
                place = where[i].decode(errors="replace")
                report.skip(place, Skipped("id: duplicate", "another record came first"))
                report.records[SPLITS[splits[i]]] -= 1
        out.append((own, splits, sizes))
    return out


def _groups(parts: list[Part]) -> list[list[Part]]:
    """Consecutive shards, together while they are small."""
    groups, size = [[]], 0
    for part in parts:
        own = int(part[2].sum())
        if groups[-1] and size + own > _MERGE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += own
    return groups


def _store_lengths(options: Options, out: epath.Path, split: str, parts: list[Part]) -> None:
    chat = _chat(options.tokenizer)
    if chat is None:
        return
    for spec in options.lengths:
        task, form = spec.split(":")
        measured = []
        for job, keep, _ in parts:
            path = job.file(f"-{split}-{task}-{form}.npz")
            stored = files.load_arrays(path, *packing.Lengths._fields)
            measured.append((packing.Lengths(*stored), keep))
        path = packing.lengths_path(out, split, task, form, chat)
        packing.store_lengths(path, packing.join_lengths(measured), chat)
