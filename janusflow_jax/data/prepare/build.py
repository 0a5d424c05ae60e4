"""Data as people have it -> a data set: planned once, made shard by shard, put together at the end.

    OUT/.prepare_data/plan.json      options and shards; a run with other options is refused
    OUT/.prepare_data/000012.json    shard 12 is done: its counts
    OUT/.prepare_data/000012-*       its records by split, ids, lengths
    OUT/                      the data set; dataset_info.json comes last

A killed run goes on where it was: shards are made whole or not at all, from their inputs alone, so
it does not matter who makes them, when, or twice. Which records are duplicates is seen when all are
there; the first in the order of the shards stays.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, lengths, samples
from janusflow_jax.data.prepare import (
    engines,
    files as prepare_files,
    folder,
    llava,
    parquet,
    report as prepare_report,
    text,
    transform,
    webdataset,
)
from janusflow_jax.data.prepare.raw import Options, Raw, Skip, Skipped

FORMS: dict[str, Any] = {
    "folder": folder,
    "webdataset": webdataset,
    "parquet": parquet,
    "llava": llava,
    "text": text,
}
PARTS = ".prepare_data"
"""Folder of what is not yet a data set, in OUT."""
_MERGE_BYTES = 2**26
"""Smaller shards are put together up to about this size."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to make."""

    out: str
    number: int
    shard: dict
    options: Options

    @property
    def parts(self) -> epath.Path:
        return epath.Path(self.out) / PARTS

    def file(self, name: str) -> epath.Path:
        return self.parts / f"{self.number:06}{name}"


def prepare(
    options: Options,
    out: epath.PathLike,
    engine: engines.Engine,
    tell: Callable[[int, int, int, int], None] = lambda *_: None,
    overwrite: bool = False,
) -> prepare_report.Report:
    """Makes the data set, or goes on with it.

    Args:
      options: what to read and how.
      out: folder to make.
      engine: runs the shards.
      tell: called with (shards done, shards, records, skipped) as they are made.
      overwrite: begin anew where a data set or an unfinished run of ours stands.
    Raises:
      DataError: `out` holds something else, or not one record can be used.
      DataError, DataError, DataError,
      DataError
    """
    path = epath.Path(out)
    _check_out(path, overwrite)
    _chat(options.tokenizer)  # a folder that cannot be used is told before the work
    jobs = _jobs(options, path)
    todo = [job for job in jobs if not job.file(".json").exists()]
    records = skipped = 0
    tell(len(jobs) - len(todo), len(jobs), 0, 0)
    for done, counts in enumerate(engine(run_shard, todo), len(jobs) - len(todo) + 1):
        records, skipped = (
            a + b for a, b in zip((records, skipped), counts or (0, 0), strict=True)
        )
        tell(done, len(jobs), records, skipped)
    return _assemble(options, path, jobs, engine)


def read(job: Job) -> Iterator[tuple[str, dict[str, Any], list[Skipped]] | Skip]:
    """(place, record, captions dropped from it) of every record of a shard that can be used, and
    what is skipped."""
    importer = FORMS[job.options.form]
    for found in importer.read(job.shard, job.options, job.parts / "slices"):
        if isinstance(found, Skip):
            yield found
            continue
        assert isinstance(found, Raw)
        try:
            yield found.where, *transform.record(found, job.options)
        except Skipped as e:
            yield Skip(found.where, e.reason, e.detail)


def run_shard(job: Job) -> tuple[int, int]:
    """Makes a shard's files, unless they are there; (records, skipped).

    This is all that an engine runs on its workers, but for `merge`.
    """
    done = job.file(".json")
    if done.exists():
        return 0, 0
    report = prepare_report.Report()
    made = _Measured(job.options)
    serialize = prepare_files.Serializer(job.options.kind)
    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}
        for found in read(job):
            if isinstance(found, Skip):
                prepare_report.add(report.skipped, found)
                continue
            where, record, dropped = found
            split = transform.split_of(record["id"], job.options.heldout)
            try:
                units = made.measure(record)
            except DataError as e:
                prepare_report.add(report.skipped, Skip(where, "sample: none", str(e)))
                continue
            for one in dropped:
                prepare_report.add(report.dropped, Skip(where, one.reason, one.detail))
            if split not in writers:
                path = job.file(f"-{split}.array_record")
                writers[split] = stack.enter_context(prepare_files.writer(path))
            data = serialize(record)
            writers[split].write(data)
            made.add(split, where, record["id"], len(data), units)
            report.records[split] = report.records.get(split, 0) + 1
    made.save(job)
    prepare_files.write_whole(done, json.dumps(report.to_json()).encode())
    return report.num_records, report.num_skipped


def merge(job: tuple[list[tuple[str, list[bool]]], str]) -> None:
    """Writes one file of the data set from files of shards; run by the engine."""
    prepare_files.merge(*job)


class _Measured:
    """Ids, sizes and lengths of the records of a shard."""

    def __init__(self, options: Options):
        self.specs = [tuple(spec.split(":")) for spec in options.lengths]
        self.chat = _chat(options.tokenizer)
        self.rows: list[tuple[str, int, int]] = []
        self.splits: list[int] = []
        self.units: dict[tuple, list] = collections.defaultdict(list)
        self.text: dict[tuple, list[bool]] = collections.defaultdict(list)

    def measure(self, record: dict[str, Any]) -> list[tuple[list[samples.Unit], bool]]:
        """Units for each task and form. Raises DataError."""
        if self.chat is None:
            return []
        return [
            (
                samples.units(record, task, form, self.chat),
                samples.kind(record, task) == "text",
            )
            for task, form in self.specs
        ]

    def add(self, split: str, where: str, record_id: str, size: int, units: list) -> None:
        self.rows.append((where, transform.hash_of(record_id, "id"), size))
        self.splits.append(transform.SPLITS.index(split))
        for spec, (found, is_text) in zip(self.specs, units, strict=bool(units)):
            self.units[split, *spec].append(found)
            self.text[split, *spec].append(is_text)

    def save(self, job: Job) -> None:
        where, hashes, sizes = zip(*self.rows, strict=True) if self.rows else ((), (), ())
        prepare_files.save_arrays(
            job.file("-ids.npz"),
            where=np.array([w.encode() for w in where], np.bytes_),
            hash=np.array(hashes, np.uint64),
            size=np.array(sizes, np.int64),
            split=np.array(self.splits, np.uint8),
        )
        for key, units in self.units.items():
            found = lengths.of_units(units, np.array(self.text[key], bool))
            prepare_files.save_arrays(job.file(f"-{'-'.join(key)}.npz"), **found._asdict())


@functools.lru_cache(maxsize=2)
def _chat(tokenizer: str) -> chat_format.ChatFormat | None:
    """For lengths, which do not depend on the positions of an image."""
    return chat_format.ChatFormat.load(tokenizer, num_image_tokens=1) if tokenizer else None


def _check_out(out: epath.Path, overwrite: bool) -> None:
    info = out / "dataset_info.json"
    whole = info.exists()
    begun = (out / PARTS).exists()
    ours = prepare_files.MODULE_NAME in info.read_text() if whole else begun
    if overwrite and ours:
        out.rmtree()
    elif whole:
        if begun and ours:  # stopped when all was there
            (out / PARTS).rmtree()
        raise DataError(
            f"{out}: expected no data set there; it holds one: pass --overwrite to make it anew "
            "(if this tool made it), or another --out"
        )
    elif out.exists() and not ours and any(out.iterdir()):
        raise DataError(
            f"{out}: expected a folder that is empty or does not exist; it holds other files"
        )


def _jobs(options: Options, out: epath.Path) -> list[Job]:
    """The plan's shards; the plan is made where there is none."""
    plan, given = out / PARTS / "plan.json", json.loads(json.dumps(dataclasses.asdict(options)))
    if plan.exists():
        stored = json.loads(plan.read_text())
        changed = [n for n, value in given.items() if stored["options"].get(n) != value]
        changed += [p for p, size in stored["sizes"].items() if _size(p) != size]
        if changed:
            raise DataError(
                f"{out}: expected the options and inputs of the run that was begun there; other: "
                f"{', '.join(changed)}: use the same to go on, or --overwrite to begin anew"
            )
        shards = stored["shards"]
    else:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        shards = list(FORMS[options.form].plan(options, out / PARTS / "slices"))
        sizes = {shard["path"]: _size(shard["path"]) for shard in shards if "path" in shard}
        text = json.dumps({"options": given, "sizes": sizes, "shards": shards})
        prepare_files.write_whole(plan, text.encode())
    return [Job(str(out), i, shard, options) for i, shard in enumerate(shards)]


def _size(path: str) -> int:
    found = epath.Path(path)
    return found.stat().length if found.exists() else -1


def _assemble(
    options: Options, out: epath.Path, jobs: list[Job], engine: engines.Engine
) -> prepare_report.Report:
    """Duplicates out, small files together, lengths, report, description."""
    report = prepare_report.total(json.loads(job.file(".json").read_text()) for job in jobs)
    keeps = _first_of_each_id(jobs, report)
    if not report.num_records:
        table = prepare_report.table(report)
        (out / PARTS).rmtree()
        raise DataError(f"{out}: not one record can be used:\n{table}")
    shards, num_bytes, merges = {}, {}, []
    for index, split in enumerate(transform.SPLITS):
        parts = [
            (job, keep[splits == index], sizes[splits == index])
            for job, (keep, splits, sizes) in zip(jobs, keeps, strict=True)
        ]
        parts = [part for part in parts if part[1].any()]
        if not parts:
            continue
        groups = _groups(parts)
        for i, group in enumerate(groups):
            target = out / prepare_files.shard_name(split, i, len(groups))
            files = [
                (str(job.file(f"-{split}.array_record")), keep.tolist()) for job, keep, _ in group
            ]
            merges.append((files, str(target)))
        shards[split] = [int(sum(keep.sum() for _, keep, _ in group)) for group in groups]
        num_bytes[split] = int(sum(size[keep].sum() for _, keep, size in parts))
        _store_lengths(options, out, split, [part[:2] for part in parts])
    for _ in engine(merge, merges):
        pass
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    prepare_files.write_whole(out / "report.json", (text + "\n").encode("utf-8", "replace"))
    made_by = f"Prepared by tools/prepare_data.py from data in the form {options.form}."
    prepare_files.describe(out, options.kind, shards, num_bytes, made_by)
    (out / PARTS).rmtree()
    return report


def _first_of_each_id(
    jobs: list[Job], report: prepare_report.Report
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(kept, split, size) of the records of every shard; duplicates are put into the report.

    Ids are compared by 64 bits of a hash: among 100 million records one good record is lost to a
    chance likeness in one of 3,700 data sets.
    """
    names = ("hash", "split", "size")
    columns = [prepare_files.load_arrays(job.file("-ids.npz"), *names) for job in jobs]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(c[0] for c in columns)])
    keep = np.zeros(len(hashes), bool)
    keep[np.unique(hashes, return_index=True)[1]] = True  # the first place of each
    ends = np.cumsum([len(c[0]) for c in columns])
    out = []
    for job, end, (hashed, splits, sizes) in zip(jobs, ends, columns, strict=True):
        mine = keep[end - len(hashed) : end]
        if not mine.all():
            (where,) = prepare_files.load_arrays(job.file("-ids.npz"), "where")
            for i in np.flatnonzero(~mine):
                place = where[i].decode(errors="replace")
                prepare_report.add(
                    report.skipped, Skip(place, "id: duplicate", "another came first")
                )
                report.records[transform.SPLITS[splits[i]]] -= 1
        out.append((mine, splits, sizes))
    return out


def _groups(parts: list) -> list[list]:
    """Shards in a row, together while they are small."""
    groups, size = [[]], 0
    for part in parts:
        own = int(part[2].sum())
        if groups[-1] and size + own > _MERGE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += own
    return groups


def _store_lengths(options: Options, out: epath.Path, split: str, parts: list) -> None:
    chat = _chat(options.tokenizer)
    if chat is None:
        return
    for spec in options.lengths:
        task, form = spec.split(":")
        loaded = [
            lengths.Lengths(
                *prepare_files.load_arrays(
                    job.file(f"-{split}-{task}-{form}.npz"), *lengths.Lengths._fields
                )
            )
            for job, _ in parts
        ]
        whole = lengths.join(list(zip(loaded, (keep for _, keep in parts), strict=True)))
        lengths.store(lengths.lengths_path(out, split, task, form, chat), whole, chat)
