"""Builds a data set: plans its shards, makes each on its own, puts them together at the end.

    OUT/.prepare_data/plan.json      options and shards; a run with other options is refused
    OUT/.prepare_data/000012.json    shard 12 is done: its report
    OUT/.prepare_data/000012-*       its records by split, ids, lengths
    OUT/                             the data set; dataset_info.json comes last

A shard depends on its inputs and the options only, and its files are written whole or not at all.
So a killed run resumes, and any worker may make a shard, even twice. When all shards are there,
duplicates are removed (the first in the order of the shards stays), and records that share an image
are put in one split.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import sparse
from scipy.sparse import csgraph

from janusflow_jax.config import files as config_files, lock
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, packing, samples
from janusflow_jax.data.prepare import (
    engines,
    files,
    folder,
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

FORMATS: dict[str, Any] = {
    "folder": folder,
    "webdataset": webdataset,
    "parquet": parquet,
    "llava": llava,
    "text": text,
}
"""Name -> module with `plan`, `read` and `KINDS`: see the docstring of the package."""
WORK_FOLDER = ".prepare_data"
"""In OUT, holds what is not yet a data set."""
_MARKS = ("dataset_info.json", WORK_FOLDER)
"""Either of them says that OUT is a data set of ours, or will be."""
_MERGE_BYTES = 2**26
"""Smaller shards are merged up to about this size."""

Result = tuple[dict[str, Any], list[Skipped]] | Skipped
"""What becomes of a row: a record and its dropped captions (`records.to_record`), or a reason."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to make."""

    out: str
    number: int
    shard: dict
    options: Options

    def file(self, name: str) -> epath.Path:
        return epath.Path(self.out) / WORK_FOLDER / f"{self.number:06}{name}"


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
    path = config_files.resolve(out)
    if not (path / WORK_FOLDER).exists():  # before the lock: another folder gets no file of ours
        _check_out(path, overwrite, options.inputs)
    _chat(options.tokenizer)  # fails before the work if it cannot be loaded
    is_new = not path.exists()
    with lock.Lock(path, "choose another `out`"):
        try:
            # Again: the process that held the lock may have just finished.
            _check_out(path, overwrite, options.inputs)
            # What says that the folder is ours goes last, in case this process is killed.
            entries = sorted(path.iterdir(), key=lambda x: x.name in _MARKS) if overwrite else ()
            for entry in entries:
                if entry.name != lock.FILE:
                    config_files.remove(entry)
            return _prepare(options, path, engine, progress)
        finally:
            (path / lock.FILE).unlink(missing_ok=True)
            if is_new and path.exists() and not any(path.iterdir()):
                path.rmdir()


def _prepare(
    options: Options,
    path: epath.Path,
    engine: engines.Engine,
    progress: Callable[[int, int, int, int], None],
) -> Report:
    jobs = _jobs(options, path)
    todo = [job for job in jobs if not job.file(".json").exists()]
    done, num_records, num_skipped = len(jobs) - len(todo), 0, 0
    for counts in engine(run_shard, todo):
        done += 1
        if counts:  # Beam returns none
            num_records, num_skipped = num_records + counts[0], num_skipped + counts[1]
        progress(done, len(jobs), num_records, num_skipped)
    return _assemble(options, path, jobs, engine)


def read_all(options: Options) -> Iterator[tuple[str, Result]]:
    """All records of the inputs, for a preview; nothing is written."""
    with tempfile.TemporaryDirectory() as scratch:
        for shard in FORMATS[options.format].plan(options, epath.Path(scratch)):
            yield from _read_shard(shard, options)


def _read_shard(shard: dict, options: Options) -> Iterator[tuple[str, Result]]:
    """(place, record or why there is none) of a shard."""
    is_empty = not shard.get("begin")  # the lines of a file may all begin in its first shard
    try:
        for where, place_id, row in FORMATS[options.format].read(shard, options):
            is_empty = False
            try:
                if isinstance(row, Skipped):
                    raise row
                yield where, records.to_record(row, place_id, options)
            except Skipped as e:
                yield where, e
        if is_empty:
            raise Skipped("file: empty")
    except Skipped as e:
        yield shard.get("name", ""), e


def run_shard(job: Job) -> tuple[int, int]:
    """Makes the files of a shard, unless they are there; (records, skipped).

    Engines run this and `files.merge` on their workers, nothing else.
    """
    done = job.file(".json")
    if done.exists():
        return 0, 0
    options, report = job.options, Report()
    chat = _chat(options.tokenizer)
    specs = [tuple(spec.split(":")) for spec in options.lengths] if chat else []
    serialize = files.Serializer(options.kind)
    ids: list[tuple[bytes, int, int, int]] = []  # place, hash of the id, size, split
    image_hashes: list[list[int]] = []  # of each record's images, if there is a held-out split
    units, is_text = collections.defaultdict(list), collections.defaultdict(list)
    writers: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for where, result in _read_shard(job.shard, options):
            if isinstance(result, Skipped):
                report.skip(where, result)
                continue
            record, dropped_captions = result
            try:
                measured = [samples.units(record, task, form, chat) for task, form in specs]
            except DataError as e:
                report.skip(where, Skipped("sample: none", str(e)))
                continue
            for caption in dropped_captions:
                report.drop_caption(where, caption)
            split = records.split_of(record["id"], options.heldout)
            if split not in writers:
                path = job.file(f"-{split}.array_record")
                writers[split] = stack.enter_context(files.writer(path))
            data = serialize(record)
            writers[split].write(data)
            hashed = records.hash64(record["id"], "id")
            ids.append((where.encode(errors="replace"), hashed, len(data), SPLITS.index(split)))
            encoded = samples.images_of(record) if options.heldout else []
            image_hashes.append([records.hash64(image, "image") for image in encoded])
            for (task, form), record_units in zip(specs, measured, strict=True):
                units[split, task, form].append(record_units)
                is_text[split, task, form].append(samples.kind(record, task) == "text")
            report.records[split] = report.records.get(split, 0) + 1
    where, hashes, sizes, splits = zip(*ids, strict=True) if ids else [()] * 4
    files.save_arrays(
        job.file("-ids.npz"),
        where=np.array(where, np.bytes_),
        hash=np.array(hashes, np.uint64),
        size=np.array(sizes, np.int64),
        split=np.array(splits, np.uint8),
        image=np.array(list(itertools.chain(*image_hashes)), np.uint64),
        images=np.array([len(hashes) for hashes in image_hashes], np.int32),
    )
    for key in units:
        stored = packing.lengths_of_units(units[key], np.array(is_text[key], bool))
        files.save_arrays(job.file(f"-{'-'.join(key)}.npz"), **stored._asdict())
    write_whole(done, json.dumps(report.to_json()).encode())
    return report.num_records, report.num_skipped


@functools.lru_cache(maxsize=2)
def _chat(tokenizer: str) -> Any:
    """The ChatFormat for lengths, which do not depend on the number of positions of an image.

    None without a tokenizer.
    """
    return chat_format.ChatFormat.load(tokenizer, num_image_tokens=1) if tokenizer else None


def _check_out(out: epath.Path, overwrite: bool, inputs: Sequence[str]) -> None:
    """Raises DataError unless `out` is free or holds our unfinished run."""
    work = out / WORK_FOLDER
    is_whole = (out / "dataset_info.json").exists()
    if work.exists() and not is_whole and not overwrite:
        return
    mark = ("dataset_info.json", files.MODULE_NAME) if is_whole else (WORK_FOLDER, "")
    written = "dataset_info.json", "features.json", "report.json", "*.array_record*", "lengths"
    made = *written, lock.FILE, WORK_FOLDER
    problem = config_files.problem_of_out(out, overwrite, mark, made, inputs, may_lie_inside=True)
    if problem:
        if work.exists() and not overwrite:  # stopped between the data set and the clean-up
            work.rmtree()
        raise DataError(problem)


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
    else:
        shards = list(FORMATS[options.format].plan(options, work / "slices"))
        sizes = {shard["path"]: _size(shard["path"]) for shard in shards if "path" in shard}
        plan = {"options": wanted, "sizes": sizes, "shards": shards}
        work.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plan).encode())
    for shard in plan["shards"]:
        if "slice" in shard:  # plans of 0.1.0 hold the file's name only
            shard["slice"] = str(work / "slices" / epath.Path(shard["slice"]).name)
    return [Job(str(out), i, shard, options) for i, shard in enumerate(plan["shards"])]


def _size(name: str) -> int:
    path = epath.Path(name)
    return config_files.size(path) if path.exists() else -1


def _assemble(options: Options, out: epath.Path, jobs: list[Job], engine: engines.Engine) -> Report:
    """Removes duplicates, merges small files, stores lengths, writes report and description."""
    report = Report.total(json.loads(job.file(".json").read_text()) for job in jobs)
    columns = [files.load_arrays(job.file("-ids.npz"), "hash", "split", "size") for job in jobs]
    is_first = _first_of_each_id(jobs, columns, report)
    if not report.num_records:
        (out / WORK_FOLDER).rmtree()
        raise DataError(f"{out}: no record can be used:\n{report.table()}")
    new_splits = _splits_by_image(jobs, columns, is_first, report) if options.heldout else None
    chat = _chat(options.tokenizer)
    shards, num_bytes, merges = {}, {}, []
    for index, split in enumerate(SPLITS):
        # (job, split of its file, which of the file's records stay: bool[n], their sizes: int64[n])
        parts = []
        for i, (job, (_, splits, sizes)) in enumerate(zip(jobs, columns, strict=True)):
            new = splits if new_splits is None else new_splits[i]
            for old in (index, 1 - index):  # few records move from the other split
                stays = (is_first[i] & (new == index))[splits == old]
                if stays.any():
                    parts.append((job, SPLITS[old], stays, sizes[splits == old]))
        if not parts:
            continue
        groups, group_bytes = [[]], 0  # consecutive shards, together while they are small
        for job, old, stays, sizes in parts:
            if groups[-1] and group_bytes + sizes.sum() > _MERGE_BYTES:
                groups.append([])
                group_bytes = 0
            groups[-1].append((str(job.file(f"-{old}.array_record")), stays.tolist()))
            group_bytes += sizes.sum()
        for i, group in enumerate(groups):
            merges.append((str(out / files.shard_name(split, i, len(groups))), group))
        shards[split] = [sum(sum(stays) for _, stays in group) for group in groups]
        num_bytes[split] = int(sum(sizes[stays].sum() for *_, stays, sizes in parts))
        for spec in options.lengths if chat else ():
            task, form = spec.split(":")
            measured = []
            for job, old, stays, _ in parts:
                path = job.file(f"-{old}-{task}-{form}.npz")
                stored = files.load_arrays(path, *packing.Lengths._fields)
                measured.append((packing.Lengths(*stored), stays))
            path = packing.lengths_path(out, split, task, form, chat)
            packing.store_lengths(path, packing.join_lengths(measured), chat)
    for _ in engine(files.merge, merges):
        pass
    content = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    write_whole(out / "report.json", (content + "\n").encode("utf-8", "replace"))
    description = f"Prepared by tools/prepare_data.py from data in the form {options.format}."
    files.describe(out, options.kind, shards, num_bytes, description)
    (out / WORK_FOLDER).rmtree()
    return report


def _first_of_each_id(
    jobs: list[Job], columns: list[list[np.ndarray]], report: Report
) -> list[np.ndarray]:
    """Whether each record is the first with its id, bool[n] of every shard; reports the others.

    Ids are compared by 64 bits of a hash. For 100 million records, one of 3,700 data sets loses a
    good record to a collision.

    Args:
      jobs: the shards.
      columns: hash of the id, split and size of the records of every shard.
      report: gets the duplicates.
    """
    hashes = np.concatenate([np.zeros(0, np.uint64), *(column[0] for column in columns)])
    is_first = np.zeros(len(hashes), bool)
    is_first[np.unique(hashes, return_index=True)[1]] = True
    ends = np.cumsum([len(column[0]) for column in columns])
    out = np.split(is_first, ends[:-1]) if jobs else []
    for job, first, (_, splits, _) in zip(jobs, out, columns, strict=True):
        if first.all():
            continue
        (where,) = files.load_arrays(job.file("-ids.npz"), "where")
        for i in np.flatnonzero(~first):
            place = where[i].decode(errors="replace")
            report.skip(place, Skipped("id: duplicate", "another record came first"))
            report.records[SPLITS[splits[i]]] -= 1
    return out


def _splits_by_image(
    jobs: list[Job], columns: list[list[np.ndarray]], is_first: list[np.ndarray], report: Report
) -> list[np.ndarray]:
    """The split of each record, uint8[n] of every shard, so that no image is in two splits.

    Records that share an image, directly or through others, get the split of the one whose id has
    the smallest hash. The others keep their own. Corrects the counts of the report.

    Args:
      jobs: the shards.
      columns: hash of the id, split and size of the records of every shard.
      is_first: which records stay; the others join no images.
      report: of the shards.
    """
    hashes, splits = (np.concatenate([column[i] for column in columns]) for i in (0, 1))
    stays = np.concatenate(is_first)
    try:
        stored = [files.load_arrays(job.file("-ids.npz"), "image", "images") for job in jobs]
    except KeyError as e:
        raise DataError(
            "the unfinished run is of an older version, which divided by record: set `overwrite` "
            "to start again"
        ) from e
    images, counts = (np.concatenate(x) for x in zip(*stored, strict=True))
    owners = np.repeat(np.arange(len(hashes)), counts)
    images, owners = images[stays[owners]], owners[stays[owners]]
    order = np.argsort(images, kind="stable")
    is_same = np.diff(images[order]) == 0
    pairs = np.stack([owners[order][:-1][is_same], owners[order][1:][is_same]])
    nodes, edges = np.unique(pairs, return_inverse=True)  # only records that share an image
    left, right = edges.reshape(pairs.shape)
    graph = sparse.coo_array((np.ones(len(left), bool), (left, right)), (len(nodes), len(nodes)))
    _, groups = csgraph.connected_components(graph, directed=False)
    by_id = np.argsort(hashes[nodes])
    _, first = np.unique(groups[by_id], return_index=True)
    new = splits.copy()
    new[nodes] = splits[nodes[by_id][first]][groups]
    report.records = {s: int((new[stays] == i).sum()) for i, s in enumerate(SPLITS)}
    report.records = {split: count for split, count in report.records.items() if count}
    return np.split(new, np.cumsum([len(column[0]) for column in columns])[:-1])
