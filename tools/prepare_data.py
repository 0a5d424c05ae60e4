"""Turns data as people have it into a data set that training reads, with stored lengths.

    python tools/prepare_data.py folder photos/ --out data/photos --tokenizer models/start/hub
    python tools/prepare_data.py webdataset 'cc12m/*.tar' --out data/cc12m --workers 16 ...
    python tools/prepare_data.py parquet cauldron/ --out data/cauldron ...
    python tools/prepare_data.py llava llava_instruct.json --images coco/ --out data/llava ...
    python tools/prepare_data.py text wiki/*.jsonl.gz --out data/text ...

`--dry-run` shows ten samples as the model will see them and writes nothing but a sheet of their
pictures. A killed run goes on by the same command. What was skipped and why is printed and in
OUT/report.json. Inputs and --out may be gs:// and s3:// paths (with gcsfs, s3fs). More than one
machine: --engine beam or ray, docs/data_at_scale.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etils import epath
from PIL import Image

from janusflow_jax import cli
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format
from janusflow_jax.data.prepare import (
    build,
    engines,
    parquet,
    preview,
    report as prepare_report,
)
from janusflow_jax.data.prepare.raw import KINDS, Options

_BOTH = ("understand:chat", "understand:plain")
LENGTHS = {
    "captions": (*_BOTH, "generate:chat", "generate:plain"),
    "conversation": _BOTH,
    "document": _BOTH,
    "text": ("text:plain", "text:chat"),
}
"""What lengths are stored for, where --lengths does not say: all that a config can ask for."""
KINDS_OF = {
    "folder": ("captions", "conversation", "document"),
    "webdataset": ("captions", "conversation", "document"),
    "parquet": ("captions", "conversation", "document", "text"),
    "llava": ("conversation",),
    "text": ("text",),
}
"""What a form can hold; the first is meant where --kind does not say (parquet: by its columns)."""


def parser() -> argparse.ArgumentParser:
    default = Options("", ())
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("form", choices=list(build.FORMS))
    p.add_argument("inputs", nargs="+", help="files, patterns with * (quoted), or folders")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--overwrite", action="store_true", help="make it anew where this tool made it")
    p.add_argument("--tokenizer", default="", help="folder; store lengths for it")
    p.add_argument(
        "--lengths",
        nargs="+",
        metavar="TASK:FORM",
        help="tasks (generate, understand, text) and forms (chat, plain) to store lengths for",
    )
    p.add_argument(
        "--kind", choices=KINDS, help="what a record is; by form, for parquet by columns"
    )
    p.add_argument("--heldout", type=float, default=0.0, help="share that becomes split heldout")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    p.add_argument("--engine", choices=("local", "beam", "ray"), default="local")
    p.add_argument(
        "--beam",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of Beam, as --beam=--runner=DataflowRunner",
    )
    p.add_argument("--ray-address", default="auto", help="of the cluster; local: one of its own")
    p.add_argument(
        "--dry-run",
        nargs="?",
        const="dry_run.png",
        metavar="PNG",
        help="show ten samples, and their pictures in this file; prepare nothing",
    )
    where = p.add_argument_group("where things are")
    where.add_argument("--images", default="", help="folder that paths of pictures start from")
    where.add_argument("--rows", default="", help="folder: a .jsonl or .csv file naming pictures")
    where.add_argument("--image-field", default="", help="field or column of the picture")
    where.add_argument("--text-field", default="", help="of the caption, turns or text")
    where.add_argument("--id-field", default="", help="of the id")
    where.add_argument(
        "--ids",
        choices=("given", "place"),
        default="given",
        help="place: ids from file and place, where given ones repeat",
    )
    where.add_argument(
        "--classes", default="", help="webdataset: file of class names, a line each, for .cls"
    )
    where.add_argument(
        "--documents", choices=("line", "file"), default="line", help="text: of .txt"
    )
    where.add_argument("--image-marker", default=default.image_marker, help="of pictures in texts")
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-side", type=int, default=0, help="shrink pictures to it; 0: keep")
    limits.add_argument("--min-side", type=int, default=default.min_side, help="pixels")
    limits.add_argument("--max-aspect", type=float, default=default.max_aspect, help="long : short")
    limits.add_argument("--max-pixels", type=int, default=default.max_pixels)
    limits.add_argument("--max-bytes", type=int, default=default.max_bytes, help="of a picture")
    limits.add_argument("--max-chars", type=int, default=default.max_chars, help="caption or turn")
    limits.add_argument("--shard-records", type=int, default=default.shard_records)
    return p


def options_of(args: argparse.Namespace) -> Options:
    """The options that the arguments mean.

    Raises:
      DataError: arguments that cannot be (lists all).
    """
    problems = [
        f"--lengths: expected generate, understand or text, a colon, chat or plain; got {spec!r}"
        for spec in args.lengths or ()
        if spec.partition(":")[0] not in ("generate", "understand", "text")
        or spec.partition(":")[2] not in ("chat", "plain")
    ]
    if not 0 <= args.heldout < 1:
        problems.append(f"--heldout: expected a share from 0 to below 1; got {args.heldout}")
    if args.max_side and args.max_side < args.min_side:
        problems.append(f"--max-side: expected at least --min-side; got {args.max_side}")
    if args.shard_records < 1:
        problems.append(f"--shard-records: expected at least 1; got {args.shard_records}")
    if args.lengths and not args.tokenizer:
        problems.append("--lengths: expected --tokenizer, whose lengths to store; got none")
    if args.dry_run and not args.tokenizer:
        problems.append("--dry-run: expected --tokenizer, to show what the model sees; got none")
    if args.rows and args.form != "folder":
        problems.append(f"--rows: expected with the form folder only; got it with {args.form}")
    allowed = KINDS_OF[args.form] if args.form != "folder" or args.rows else ("captions",)
    if args.kind and args.kind not in allowed:
        problems.append(f"--kind: expected one of {', '.join(allowed)} here; got {args.kind}")
    if args.classes and not epath.Path(args.classes).exists():
        problems.append(f"--classes: expected a file of names; no such file: {args.classes}")
    if problems:
        raise DataError("arguments:\n" + "\n".join(f"  - {p}" for p in problems))
    names = {field.name for field in dataclasses.fields(Options)}
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    given["classes"] = ()
    if args.classes:
        text = epath.Path(args.classes).read_text(encoding="utf-8")
        given["classes"] = tuple(line.strip() for line in text.splitlines())
    given["inputs"] = tuple(args.inputs)
    given["kind"] = args.kind or KINDS_OF[args.form][0]
    if args.form == "parquet" and not args.kind:
        given["kind"] = parquet.guess_kind(Options(**{**given, "lengths": ()}))
    if args.tokenizer:
        given["lengths"] = tuple(args.lengths or LENGTHS[given["kind"]])
        given["image_tag"] = chat_format.ChatFormat.load(args.tokenizer, 1).image_tag
    else:
        given["lengths"] = ()
    return Options(**given)


def main() -> int:
    args = parser().parse_args()
    start = time.time()
    options = options_of(args)
    if args.dry_run:
        return dry_run(options, args.dry_run)
    report = build.prepare(options, args.out, _engine(args), progress(start), args.overwrite)
    print(prepare_report.table(report))
    print(f"{args.out}: {options.kind}, in {time.time() - start:.1f} s; report in report.json")
    return 0


def _engine(args: argparse.Namespace) -> engines.Engine:
    if args.engine == "beam":
        return engines.beam(args.beam)
    if args.engine == "ray":
        return engines.ray(args.ray_address)
    return engines.local(args.workers)


def dry_run(options: Options, png: str) -> int:
    """Prints samples and writes their pictures; 1 where there is none."""
    chat = chat_format.ChatFormat.load(options.tokenizer)
    specs = {spec.split(":")[0]: spec.split(":")[1] for spec in reversed(options.lengths)}
    everything = []
    for task, form in reversed(specs.items()):  # the first form of every task
        shown, report = preview.show(options, chat, task, form)
        print(f"As a source of task {task}, form {form} ({preview.OPEN}learned{preview.CLOSE}):\n")
        for i, sample in enumerate(shown):
            print(f"--- {i + 1}: {sample.where}\n{sample.text}\n")
        print(prepare_report.table(report), end="\n\n")
        everything += shown
    if any(sample.pictures for sample in everything):
        Image.fromarray(preview.sheet(everything)).save(png)
        print(f"{png}: their pictures as the model gets them")
    return 0 if everything else 1


def progress(start: float) -> Callable[[int, int, int, int], None]:
    """Prints how far it is: in place on a terminal, else a line every ten seconds."""
    shown = [0.0, 0]  # when a line was printed; shards that were done when this run began

    def tell(done: int, count: int, records: int, skipped: int) -> None:
        if not records and not skipped:
            shown[1] = done
        now = time.time()
        in_place = sys.stderr.isatty()
        if done < count and now - shown[0] < (0.2 if in_place else 10):
            return
        shown[0] = now
        passed = now - start
        left = passed / max(done - shown[1], 1) * (count - done)
        line = (
            f"shard {done:,} of {count:,}; {records:,} records, {skipped:,} skipped, "
            f"{(records + skipped) / max(passed, 1e-9):,.0f} a second, {left / 60:.1f} min left"
        )
        print(
            f"\r{line}\033[K" if in_place else line,
            end="" if in_place else "\n",
            file=sys.stderr,
            flush=True,
        )
        if in_place and done == count:
            print(file=sys.stderr)

    return tell


if __name__ == "__main__":
    cli.run(main, rerun="the same command resumes with the shards that are missing")
