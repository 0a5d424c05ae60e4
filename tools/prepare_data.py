"""Prepares data as people have it for training, with stored lengths.

    python tools/prepare_data.py folder photos/ --out data/photos --tokenizer models/start/hub
    python tools/prepare_data.py webdataset 'cc12m/*.tar' --out data/cc12m --workers 16 ...
    python tools/prepare_data.py parquet cauldron/ --out data/cauldron ...
    python tools/prepare_data.py llava llava_instruct.json --images coco/ --out data/llava ...
    python tools/prepare_data.py text wiki/*.jsonl.gz --out data/text ...

`--dry-run` shows ten samples as the model will see them; it writes a sheet of their images and
nothing else. Run the same command again to resume a run that was killed. What was skipped and why
is printed and stored in OUT/report.json. Inputs and --out may be gs:// and s3:// paths (extras gcs,
s3: see docs/file_systems.md). For more than one machine, use --engine beam or ray: see
docs/data_at_scale.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals("run the same command again to resume")

from PIL import Image

from janusflow_jax import cli
from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError, JanusFlowError
from janusflow_jax.data import chat_format
from janusflow_jax.data.prepare import build, engines, parquet, report
from janusflow_jax.data.prepare.records import KINDS, Options
from janusflow_jax.eval import sheet

_WITH_IMAGES = ("--kind captions", "--kind conversation", "--kind document")
_BOTH = ("understand:chat", "understand:plain")
LENGTHS = {
    "captions": (*_BOTH, "generate:chat", "generate:plain"),
    "conversation": _BOTH,
    "document": _BOTH,
    "text": ("text:plain", "text:chat"),
}
"""The default of --lengths: all that a training config can ask for. The order is a part of
plan.json, by which an unfinished run resumes."""


READ_BY = {
    "images": ("folder --rows", "llava", "parquet"),
    "rows": ("folder",),
    "image_field": ("folder --rows", "webdataset", "parquet", "llava"),
    "text_field": ("folder --rows", "webdataset", "parquet", "llava", "text"),
    "id_field": ("folder --rows", "parquet", "llava", "text"),
    "classes": ("webdataset",),
    "documents": ("text",),
    "shard_records": ("folder", "parquet", "llava", "text --documents file"),
    "beam": ("--engine beam",),
    "ray_address": ("--engine ray",),
    "workers": ("--engine local",),
    "image_marker": ("--kind conversation", "--kind document"),
    "max_chars": ("--kind captions", "--kind conversation"),
    "max_side": _WITH_IMAGES,
    "min_side": _WITH_IMAGES,
    "max_aspect": _WITH_IMAGES,
    "max_pixels": _WITH_IMAGES,
    "max_bytes": _WITH_IMAGES,
}
"""Option -> the formats, engines and kinds that read it. Any run reads the other options."""


def parser() -> argparse.ArgumentParser:
    default = Options("", ())
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("format", choices=list(build.FORMATS))
    p.add_argument(
        "inputs",
        nargs="+",
        type=os.path.expanduser,
        help="files, quoted patterns with *, or folders; read in natural order (2 before 10)",
    )
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument(
        "--overwrite", action="store_true", help="replace a data set that this tool prepared"
    )
    p.add_argument(
        "--tokenizer",
        type=os.path.expanduser,
        default="",
        help="folder of a tokenizer; stores lengths for it",
    )
    p.add_argument(
        "--lengths",
        nargs="+",
        metavar="TASK:FORM",
        choices=(*LENGTHS["captions"], *LENGTHS["text"]),
        help="tasks (generate, understand, text) and forms (chat, plain) to store lengths for",
    )
    p.add_argument(
        "--kind", choices=KINDS, help="what a record is; default: by format, or parquet's columns"
    )
    p.add_argument(
        "--heldout",
        type=float,
        default=0.0,
        help="share that becomes split heldout; no image is in both",
    )
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    p.add_argument("--engine", choices=("local", "beam", "ray"), default="local")
    p.add_argument(
        "--beam",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of Beam, such as --beam=--runner=DataflowRunner",
    )
    p.add_argument(
        "--ray-address", default="auto", help="of the Ray cluster; local: start one here"
    )
    p.add_argument(
        "--dry-run",
        nargs="?",
        const="dry_run.png",
        metavar="PNG",
        help="show ten samples, and their images in this file; prepare nothing",
    )
    where = p.add_argument_group("where things are")
    where.add_argument(
        "--images",
        type=os.path.expanduser,
        default="",
        help="folder of the images (JPEG, PNG, WebP), which rows name by paths in it; links in it "
        "are followed",
    )
    where.add_argument(
        "--rows",
        type=os.path.expanduser,
        default="",
        help="folder: a .jsonl or .csv file of the images",
    )
    where.add_argument("--image-field", default="", help="field, column or member of the image")
    where.add_argument(
        "--text-field", default="", help="of the caption, turns or text; a/b is b in a"
    )
    where.add_argument("--id-field", default="", help="of the id")
    where.add_argument(
        "--ids",
        choices=("given", "place"),
        default="given",
        help="place: make ids from file and place, if ids repeat from file to file",
    )
    where.add_argument(
        "--classes", default="", help="webdataset: file of class names, one a line, for .cls"
    )
    where.add_argument(
        "--documents",
        choices=("line", "file"),
        default="line",
        help="text: what is a document in .txt files",
    )
    where.add_argument(
        "--image-marker", default=default.image_marker, help="marks an image in a text"
    )
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-side", type=int, default=0, help="shrink images to it; 0: keep")
    limits.add_argument("--min-side", type=int, default=default.min_side, help="pixels")
    limits.add_argument("--max-aspect", type=float, default=default.max_aspect, help="long : short")
    limits.add_argument("--max-pixels", type=int, default=default.max_pixels)
    limits.add_argument("--max-bytes", type=int, default=default.max_bytes, help="of an image")
    limits.add_argument("--max-chars", type=int, default=default.max_chars, help="caption or turn")
    limits.add_argument("--shard-records", type=int, default=default.shard_records)
    return p


def options_of(args: argparse.Namespace) -> Options:
    """The options that the arguments mean.

    Raises:
      DataError: arguments that cannot work.
    """
    kinds = build.FORMATS[args.format].KINDS
    if args.format == "folder" and not args.rows:
        kinds = ("captions",)
    if args.kind and args.kind not in kinds:
        raise DataError(f"--kind: expected one of {', '.join(kinds)}; got {args.kind}")
    if not 0 <= args.heldout < 1:
        raise DataError(f"--heldout: expected a share from 0 to below 1; got {args.heldout}")
    if args.max_side and args.max_side < args.min_side:
        raise DataError(f"--max-side: expected at least --min-side; got {args.max_side}")
    if args.shard_records < 1:
        raise DataError(f"--shard-records: expected at least 1; got {args.shard_records}")
    if (args.lengths or args.dry_run) and not args.tokenizer:
        raise DataError("--lengths and --dry-run: expected --tokenizer too; got none")
    paths = (*args.inputs, args.out, args.images, args.rows, args.classes, args.tokenizer)
    for path in (*paths, args.dry_run or ""):
        files.resolve(path)  # a bucket that cannot be opened ends the run here
    names = {field.name for field in dataclasses.fields(Options)}
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    values |= {"inputs": tuple(args.inputs), "kind": args.kind or kinds[0]}
    values |= {"classes": (), "lengths": ()}
    if args.classes:
        values["classes"] = tuple(files.read_lines(files.resolve(args.classes)))
    if args.format == "parquet" and not args.kind:
        values["kind"] = parquet.guess_kind(args.inputs, args.image_field)
    _check_read(args, values["kind"])
    if args.tokenizer:
        values["lengths"] = tuple(args.lengths or LENGTHS[values["kind"]])
        values["image_tag"] = chat_format.ChatFormat.load(args.tokenizer, 1).image_tag
    return Options(**values)


def _check_read(args: argparse.Namespace, kind: str) -> None:
    """Raises DataError for an option that this run would not read."""
    run = [args.format, f"--engine {args.engine}", f"--kind {kind}"]
    run += [f"{args.format} --rows"] if args.rows else []
    run += [f"{args.format} --documents file"] if args.documents == "file" else []
    default = parser().get_default
    for option, readers in READ_BY.items():
        if getattr(args, option) != default(option) and not set(readers) & set(run):
            raise DataError(
                f"`{option}`: expected {' or '.join(readers)}, which read it; got "
                f"{', '.join(run)}: leave it out"
            )
    if args.id_field and args.ids == "place":
        raise DataError("`id_field`: expected --ids given; got place: leave one out")


def main() -> int:
    args = parser().parse_args()
    start = time.time()
    try:
        options = options_of(args)
        if args.dry_run:
            return dry_run(options, args.dry_run)
        result = build.prepare(options, args.out, _engine(args), progress(start), args.overwrite)
    except JanusFlowError as e:
        raise type(e)(_with_flags(str(e), args)) from e
    print(_with_flags(result.table(), args))
    print(f"{args.out}: {options.kind}, in {time.time() - start:.1f} s; report in report.json")
    return 0


def _with_flags(message: str, args: argparse.Namespace) -> str:
    """A message of the library that names flags (--overwrite) for arguments (`overwrite`)."""
    names = "|".join(vars(args))
    return re.sub(f"`({names})`", lambda match: "--" + match[1].replace("_", "-"), message)


def _engine(args: argparse.Namespace) -> engines.Engine:
    if args.engine == "beam":
        return engines.beam(args.beam)
    if args.engine == "ray":
        return engines.ray(args.ray_address)
    return engines.local(args.workers)


def dry_run(options: Options, png: str) -> int:
    """Prints samples and writes their images; 1 if there is none."""
    chat = chat_format.ChatFormat.load(options.tokenizer)
    forms: dict[str, str] = {}  # task -> the first form that was asked for
    for spec in options.lengths:
        task, form = spec.split(":")
        forms.setdefault(task, form)
    previews = []
    for task, form in forms.items():
        new, skipped = report.preview(build.read_all(options), chat, task, form)
        print(f"As a source of task {task}, form {form} ({report.OPEN}targets{report.CLOSE}):\n")
        for i, sample in enumerate(new):
            print(f"--- {i + 1}: {sample.where}\n{sample.text}\n")
        print(skipped.table(), end="\n\n")
        previews += new
    if any(sample.images for sample in previews):
        sheet.save(Image.fromarray(report.sheet(previews)), files.resolve(png))
        print(f"{png}: their images as the model sees them")
    return 0 if previews else 1


def progress(start: float) -> Callable[[int, int, int, int], None]:
    """Prints the progress, at most once in ten seconds."""
    last_print = 0.0

    def show(done: int, count: int, records: int, skipped: int) -> None:
        nonlocal last_print
        now = time.time()
        if done == count or now - last_print > 10:
            last_print = now
            rate = (records + skipped) / max(now - start, 1e-9)
            cli.log(
                f"shard {done:,} of {count:,}; {records:,} records, {skipped:,} skipped, "
                f"{rate:,.0f}/s"
            )

    return show


if __name__ == "__main__":
    cli.run(main, rerun="run the same command again to resume")
