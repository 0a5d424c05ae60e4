"""Building data sets: the same bytes from any workers, resume, reports, refusals, previews."""

from __future__ import annotations

import collections
import csv
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from helpers import scenes

from janusflow_jax.config import files as config_files, lock
from janusflow_jax.config.errors import DataError, JanusFlowError
from janusflow_jax.data import chat_format, images, packing, samples, sources
from janusflow_jax.data.prepare import (
    build,
    engines,
    inputs,
    parquet,
    records,
    report as report_lib,
)
from janusflow_jax.data.prepare.inputs import Skipped
from janusflow_jax.data.prepare.records import Options

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "tests" / "data" / "golden" / "tiny" / "janusflow"
TOOL = ROOT / "tools" / "prepare_data.py"


def make_folder(folder: Path, count: int, jpg: bytes | None = None) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.jpg").write_bytes(jpg or scenes.encoded(quality=60 + i % 40))
        words = " ".join("a red wall beside a blue one".split()[: 1 + i % 7])
        (folder / f"{i:03}.txt").write_text(f"{i} {words}")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "zero.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures") / "in", 40)


def options(folder: Path, **changes: object) -> Options:
    default = {"tokenizer": str(HUB), "lengths": ("generate:chat", "understand:plain")}
    return Options("folder", (str(folder),), **(default | {"shard_records": 7} | changes))


def run(opts: Options, out: Path, engine: engines.Engine | None = None, **more):
    return build.prepare(opts, out, engine or engines.local(1), **more)


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def stored(out: Path, split: str = "train") -> list[dict]:
    source = sources.open_source(out, split)
    return [source[i] for i in range(len(source))]


class RecordingEngine:
    """An engine that records the jobs of a function, and is interrupted after some of them."""

    def __init__(self, stop_after: int = -1, function: str = ""):
        self.ran, self.stop_after, self.function = [], stop_after, function

    def __call__(self, function, jobs):
        for job in jobs:
            if function.__name__ == self.function and len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            yield function(job)
            if function.__name__ == self.function:
                self.ran.append(job)


def test_report_lengths_and_splits(folder, tmp_path):
    out = tmp_path / "out"
    report = run(options(folder, heldout=0.3), out)
    train, held = stored(out), stored(out, "heldout")
    assert report.records == {"train": len(train), "heldout": len(held)}
    assert len(train) + len(held) == 40 and 5 <= len(held) <= 20
    assert [r["id"] for r in train] == sorted(r["id"] for r in train)
    assert all(records.split_of(r["id"], 0.3) == "heldout" for r in held)
    report_file = json.loads((out / "report.json").read_text())
    assert report_file["skipped"] == {
        "image: 0 bytes": {
            "count": 1,
            "examples": [["zero.jpg", "expected an image; got 0 bytes"]],
        }
    }
    assert "zero.jpg" in report.table()
    chat = chat_format.ChatFormat.load(HUB)
    for split in ("train", "heldout"):
        source = sources.open_source(out, split)
        for task, form in (("generate", "chat"), ("understand", "plain")):
            assert packing.lengths_path(out, split, task, form, chat).exists()
            (got,) = packing.load_lengths(source, str(out), split, task, form, chat)
            want = packing.measure_lengths(source, task, form, chat)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype


def test_a_larger_heldout_share_keeps_what_was_held_out():
    ids = [f"id {i}" for i in range(2000)]
    small, large = (
        {i for i in ids if records.split_of(i, share) == "heldout"} for share in (0.01, 0.1)
    )
    assert small < large and 5 < len(small) < 40 and 150 < len(large) < 250


def _captions_of_an_image(folder: Path) -> list[dict]:
    return [{"image": f"{i % 12}.jpg", "caption": f"caption {i}"} for i in range(60)]


def _copies_of_an_image(folder: Path) -> list[dict]:
    for i in range(12):
        (folder / f"copy{i}.jpg").write_bytes((folder / f"{i}.jpg").read_bytes())
    names = [f"{kind}{i}.jpg" for kind in ("", "copy") for i in range(12)]
    return [{"image": name, "caption": name} for name in names]


def _chains_of_images(folder: Path) -> list[dict]:
    """Each record shares an image with the next of its chain; the first and last share none."""
    chains = [(0, 1, 2, 3), (4, 5, 6), (7, 8), (9, 10, 11)]
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Yes."}]
    links = [(a, b) for chain in chains for a, b in itertools.pairwise(chain)]
    links = sorted(links, key=lambda x: x[0] % 3)  # a chain lies in several shards
    return [{"images": [f"{a}.jpg", f"{b}.jpg"], "conversations": turns} for a, b in links]


@pytest.mark.parametrize("shard_records", [4, 1000])
@pytest.mark.parametrize(
    ("rows_of", "kind", "groups"),
    [
        (_captions_of_an_image, "captions", 12),
        (_copies_of_an_image, "captions", 12),
        (_chains_of_images, "conversation", 4),
    ],
)
def test_no_image_is_in_two_splits(rows_of, kind, groups, shard_records, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(12):
        (source / f"{i}.jpg").write_bytes(scenes.encoded(quality=60 + i))
    rows = rows_of(source)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    form = "understand:chat"
    changes = {"rows": str(tmp_path / "rows.jsonl"), "kind": kind, "lengths": (form,)}
    opts = options(source, heldout=0.5, shard_records=shard_records, **changes)
    report = run(opts, tmp_path / "out")
    chat, found = chat_format.ChatFormat.load(HUB), {}
    for split in ("train", "heldout"):
        data = sources.open_source(tmp_path / "out", split)
        assert len(data) == report.records[split]
        found[split] = [data[i] for i in range(len(data))]
        stored = packing.load_lengths(
            data, str(tmp_path / "out"), split, "understand", "chat", chat
        )
        (got,) = stored
        want = packing.measure_lengths(data, "understand", "chat", chat)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    pictures = {
        split: {image for record in records_ for image in samples.images_of(record)}
        for split, records_ in found.items()
    }
    assert pictures["train"] and pictures["heldout"]
    assert not pictures["train"] & pictures["heldout"]
    assert len(pictures["train"] | pictures["heldout"]) == 12
    assert len(found["train"]) + len(found["heldout"]) == len(rows) > groups


def test_images_of_their_own_leave_the_split_to_the_id(tmp_path):
    """The data set is that of a division by record, whatever the shards."""
    source = make_folder(tmp_path / "in", 30)
    run(options(source, heldout=0.4), tmp_path / "out")
    for split in ("train", "heldout"):
        ids = [record["id"] for record in stored(tmp_path / "out", split)]
        assert ids == [i for i in sorted(ids) if records.split_of(i, 0.4) == split]


def command(folder: Path, out: Path, *arguments: str) -> list[str]:
    """The command line that means `options(folder)`."""
    paths = [str(folder), "--out", str(out), "--tokenizer", str(HUB)]
    more = ["--lengths", "generate:chat", "understand:plain", *arguments]
    return [sys.executable, str(TOOL), "folder", *paths, *more]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(folder, tmp_path):
    run(options(folder, heldout=0.2), tmp_path / "one")
    want = contents(tmp_path / "one")
    env = os.environ | {"PYTHONHASHSEED": "7"}
    more = ("--workers", "3", "--heldout", "0.2", "--shard-records", "7")
    arguments = command(folder, tmp_path / "three", *more)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
    assert contents(tmp_path / "three") == want
    assert "train: 3" in done.stdout and "zero.jpg" in done.stdout
    assert "shard 6 of 6" in done.stderr


def test_a_stopped_run_resumes_with_the_missing_shards(folder, tmp_path):
    opts, out = options(folder, heldout=0.2), tmp_path / "out"
    run(opts, tmp_path / "whole")
    first = RecordingEngine(stop_after=2, function="run_shard")
    with pytest.raises(KeyboardInterrupt):
        run(opts, out, first)
    with pytest.raises(DataError, match="expected a prepared data set"):
        sources.open_source(out, "train")
    made = {p.name: p.stat().st_mtime_ns for p in (out / ".prepare_data").iterdir() if p.is_file()}
    second = RecordingEngine(stop_after=1, function="merge")
    with pytest.raises(KeyboardInterrupt):
        run(opts, out, second)
    later = {p.name: p.stat().st_mtime_ns for p in (out / ".prepare_data").iterdir()}
    kept = [n for n in made if n.startswith(("000000", "000001"))]
    assert len(kept) >= 6 and all(later.get(n, made[n]) == made[n] for n in kept)
    third = RecordingEngine(function="run_shard")
    report = run(opts, out, third)
    assert not third.ran and report.num_records == 40
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process_on_one_folder_is_refused(folder, tmp_path, overwrite):
    """While the first has made nothing, and when it has made half."""
    out, second = tmp_path / "out", []

    def engine(function, jobs):
        for job in jobs:
            with pytest.raises(JanusFlowError, match=f"process {os.getpid()} on .*another `out`"):
                run(options(folder), out, overwrite=overwrite)
            second.append(job)
            yield function(job)

    run(options(folder), out, engine)
    assert len(second) > 2 and contents(out).keys() > {"dataset_info.json", "report.json"}
    assert "lock" not in contents(out) and len(stored(out)) == 40
    (out / ".prepare_data").mkdir()  # the first is removing it
    with lock.Lock(epath.Path(out), ""), pytest.raises(JanusFlowError, match="another process"):
        run(options(folder), out)
    assert (out / ".prepare_data").exists()


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path):
    """SIGKILL of the whole process group while its workers write."""
    folder = make_folder(tmp_path / "in", 60, scenes.encoded("JPEG", scenes.scene((1800, 1200))))
    opts, out = options(folder, shard_records=4), tmp_path / "out"
    arguments = command(folder, out, "--workers", "2", "--shard-records", "4")
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while len(list(out.glob(".prepare_data/0*.json"))) < 2:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "dataset_info.json").exists()
    finished = {p.name for p in out.glob(".prepare_data/0*.json")}
    assert 2 <= len(finished) < 16
    again = RecordingEngine(function="run_shard")
    report = run(opts, out, again)
    assert {f"{job.number:06}.json" for job in again.ran}.isdisjoint(finished)
    assert len(again.ran) + len(finished) == 16
    assert report.num_records == 60
    run(opts, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_existing_data_is_not_overwritten(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(options(folder), out)
    before = contents(out)
    with pytest.raises(DataError, match="overwrite"):
        run(options(folder), out)
    assert contents(out) == before
    for name in ("notes.txt", "train.json"):
        (out / name).write_text("years of work")
        with pytest.raises(DataError, match=name):
            run(options(folder, max_side=32), out, overwrite=True)
        (out / name).unlink()
    with monkeypatch.context() as killed:
        remove, removed = config_files.remove, []

        def remove_some(path):
            if len(removed) == 2:
                raise KeyboardInterrupt
            removed.append(remove(path))

        killed.setattr(config_files, "remove", remove_some)
        with pytest.raises(KeyboardInterrupt):
            run(options(folder, max_side=32), out, overwrite=True)
    run(options(folder, max_side=32), out, overwrite=True)
    assert len(stored(out)) == 40 and contents(out) != before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    (other / "report.json").write_text("{}")
    (other / "dataset_info.json").write_text('{"moduleName": "another"}')
    with pytest.raises(DataError, match="overwrite"):
        run(options(folder), other, overwrite=True)
    (other / "dataset_info.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="other files"):
            run(options(folder), other, overwrite=overwrite)
    assert (other / "thesis.tex").exists()


def test_a_run_with_other_options_or_inputs_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n")
    opts = Options("text", (str(text),), kind="text")
    with pytest.raises(KeyboardInterrupt):
        run(opts, tmp_path / "out", RecordingEngine(stop_after=0, function="run_shard"))
    plan = tmp_path / "out" / ".prepare_data" / "plan.json"
    plan.write_text(plan.read_text().replace('"format"', '"form"'))  # as version 0.1.0 wrote it
    with pytest.raises(DataError, match="differ: heldout, max_chars:"):
        run(Options("text", (str(text),), kind="text", heldout=0.1, max_chars=9), tmp_path / "out")
    text.write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match=r"differ: .*a\.txt"):
        run(opts, tmp_path / "out")
    assert run(opts, tmp_path / "out", overwrite=True).num_records == 3


def test_no_good_record_is_an_error_with_the_reasons(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xff\n\0")
    with pytest.raises(DataError, match="(?s)no record.*text: not UTF-8"):
        run(Options("text", (str(text),), kind="text"), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    (tmp_path / "empty").mkdir()
    for heldout in (0.0, 0.5):
        with pytest.raises(DataError, match="no record can be used"):
            run(Options("folder", (str(tmp_path / "empty"),), heldout=heldout), tmp_path / "out2")


def test_images_are_shrunk_upright_or_kept_as_they_are(tmp_path):
    opts = Options("folder", (), max_side=48)
    turned = images.decode(records.load_image(scenes.turned(6), opts))
    assert turned.shape == (32, 48, 3) and scenes.looks_right(turned)
    cmyk = records.load_image(scenes.encoded("JPEG", scenes.scene().convert("CMYK")), opts)
    assert scenes.looks_right(images.decode(cmyk))
    png = records.load_image(scenes.encoded("PNG"), opts)
    assert png.startswith(b"\x89PNG") and images.decode(png).shape == (32, 48, 3)
    small = scenes.encoded("JPEG", scenes.scene((48, 32)))
    assert records.load_image(small, opts) == small
    with pytest.raises(Skipped, match="too many pixels"):
        records.load_image(scenes.encoded(), Options("folder", (), max_pixels=96 * 64 - 1))


def test_small_shards_are_merged_and_large_ones_are_not(folder, tmp_path, monkeypatch):
    run(options(folder), tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.array_record*"))) == 1
    monkeypatch.setattr(build, "_MERGE_BYTES", 12_000)
    run(options(folder), tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.array_record*"))) > 2
    for a, b in zip(stored(tmp_path / "one"), stored(tmp_path / "many"), strict=True):
        assert a == b


def test_duplicates_across_shards_leave_the_first(tmp_path):
    rows = [{"id": str(i % 30), "text": f"text {i}"} for i in range(50)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    opts = Options(
        "text",
        (str(file),),
        kind="text",
        shard_bytes=200,
        tokenizer=str(HUB),
        lengths=("text:plain",),
    )
    report = run(opts, tmp_path / "out")
    assert [r["text"] for r in stored(tmp_path / "out")] == [f"text {i}" for i in range(30)]
    assert report.skipped["id: duplicate"]["count"] == 20
    chat = chat_format.ChatFormat.load(HUB)
    source = sources.open_source(tmp_path / "out", "train")
    (measured,) = packing.load_lengths(
        source, str(tmp_path / "out"), "train", "text", "plain", chat
    )
    for a, b in zip(measured, packing.measure_lengths(source, "text", "plain", chat), strict=True):
        np.testing.assert_array_equal(a, b)
    again = Options("text", (str(file),), kind="text", shard_bytes=200, ids="place")
    assert run(again, tmp_path / "places").num_records == 50


def test_text_of_whole_files(tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "b" / "c.txt").write_text("three")
    opts = Options("text", (str(folder),), kind="text", documents="file")
    run(opts, tmp_path / "out")
    got = {r["id"]: r["text"] for r in stored(tmp_path / "out")}
    assert got == {"a.txt": "one\n\ntwo", "b/c.txt": "three"}


def test_documents_with_images(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    documents = [
        {"id": "a", "images": ["000.jpg", "001.jpg"], "text": "First <image> then <image> end."},
        {"id": "b", "images": ["000.jpg"], "text": "No mark."},
    ]
    rows.write_text("\n".join(map(json.dumps, documents)))
    opts = options(folder, rows=str(rows), kind="document", lengths=("understand:chat",))
    report = run(opts, tmp_path / "out")
    (got,) = stored(tmp_path / "out")
    tag = "<image_placeholder>"
    assert got["text"] == f"First {tag} then {tag} end." and len(got["images"]) == 2
    assert list(report.skipped) == ["images: more than their marks"]


def test_missing_inputs_are_an_error_before_the_work(tmp_path):
    opts = Options("webdataset", (str(tmp_path / "*.tar"),))
    with pytest.raises(DataError, match=r"\*\.tar: expected a file, a pattern"):
        run(opts, tmp_path / "out")
    with pytest.raises(DataError, match="expected one folder"):
        run(Options("folder", (str(tmp_path / "gone"),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_that_fails_once_loses_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_SECONDS", (0,))
    attempts = collections.Counter()

    def open_file(path, what, real=inputs._open):
        attempts[str(path)] += 1
        if attempts[str(path)] == 1:
            raise OSError(5, "503")
        return real(path, what)

    monkeypatch.setattr(inputs, "_open", open_file)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    report = run(Options("text", (str(tmp_path / "a.txt"),), kind="text"), tmp_path / "out")
    assert report.records == {"train": 2} and not report.num_skipped and attempts


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "LINE_LIMIT", 8)
    path = epath.Path(tmp_path / "a.txt")
    path.write_bytes(b"x" * 100 + b"\nlast\n")
    assert list(inputs.lines(path)) == [(0, b"x" * 8), (101, b"last")]
    assert list(inputs.lines(path, 50, 200)) == [(101, b"last")]


def test_half_a_character_in_a_name_can_be_printed():
    report = report_lib.Report()
    report.skip("a\udce4.jpg", inputs.Skipped("image: missing", "no \ud800"))
    assert report.table().encode().count(b"?") == 2


def test_a_bad_line_of_csv_is_one_record(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(csv, "field_size_limit", lambda _, limit=csv.field_size_limit: limit(100))
    rows = f"id,image,caption\n1,000.jpg,{'x' * 200}\n2,000.jpg,a fox\n"
    (tmp_path / "rows.csv").write_text(rows)
    report = run(options(folder, rows=str(tmp_path / "rows.csv")), tmp_path / "out")
    assert report.records == {"train": 1} and list(report.skipped) == ["line: not CSV"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'janusflow_jax\[data\]'"):
        parquet.guess_kind([str(tmp_path)])


def test_the_preview_shows_what_training_sees(folder):
    chat = chat_format.ChatFormat.load(HUB)

    def preview(task, form, count):
        return report_lib.preview(build.read_all(options(folder)), chat, task, form, count)

    shown, report = preview("understand", "plain", 3)
    assert [s.where for s in shown] == ["000.jpg", "001.jpg", "002.jpg"]
    request = chat_format.CAPTION_REQUEST
    assert shown[1].text == (
        f"<｜begin▁of▁sentence｜><image_beg>[image, {chat.num_image_tokens} positions]<image_end>"
        f"{request}« 1 a red<｜end▁of▁sentence｜>»"
    )
    side = 16 * round(chat.num_image_tokens**0.5)
    assert shown[0].images[0].shape == (side, side, 3)
    assert report_lib.sheet(shown).shape == (3 * side, side, 3)
    generated, _ = preview("generate", "chat", 1)
    assert "«" not in generated[0].text and "positions]" in generated[0].text
    everything, report = preview("understand", "plain", 99)
    assert len(everything) == 40 and list(report.skipped) == ["image: 0 bytes"]


def test_the_dry_run_writes_a_sheet_and_nothing_else(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [str(TOOL), "folder", str(folder), "--out", "out", "--tokenizer", str(HUB)]
    monkeypatch.setattr(sys, "argv", [*command, "--dry-run", "sheet.png"])
    assert runpy.run_path(str(TOOL))["main"]() == 0
    text = capsys.readouterr().out
    assert text.count("--- ") == 2 * 10 and "«" in text
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    side = 16 * round(chat_format.ChatFormat.load(HUB).num_image_tokens ** 0.5)
    assert images.decode((tmp_path / "sheet.png").read_bytes()).shape == (20 * side, side, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "no.txt"], "no.txt: expected"),
        (["text", "x", "--dry-run", "--heldout", "2"], "--heldout: expected"),
        (["text", "x", "--lengths", "text:chat"], "--tokenizer too"),
        (["text", "x", "--tokenizer", "nowhere"], "expected a tokenizer folder"),
        (["text", "x", "--kind", "captions"], "--kind: expected one of text"),
        (["text", "x", "--rows", "a.csv"], "--rows: expected folder"),
        (["text", "x", "--shard-records", "0"], "--shard-records: expected at least 1"),
    ],
)
def test_wrong_arguments_are_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments, "--out", "out"])
    with pytest.raises(DataError, match=message):
        runpy.run_path(str(TOOL))["main"]()
