"""Files, names and fields as people have them: read right, or refused by name."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from helpers import bad_tars, scenes

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format, images, sources
from janusflow_jax.data.prepare import build, engines, inputs, parquet, records, report
from janusflow_jax.data.prepare.inputs import Skipped
from janusflow_jax.data.prepare.records import Options

TOOL = Path(__file__).resolve().parents[1] / "tools" / "prepare_data.py"
JPG = scenes.encoded()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


def outcome(row: dict, **options: object) -> str:
    """'good', or the reason why a row is skipped."""
    try:
        records.to_record(row, "place", Options("llava", (), **options))
    except Skipped as e:
        return e.reason
    return "good"


def prepared(form: str, path: Path, out: Path, **options: object) -> list[dict]:
    build.prepare(Options(form, (str(path),), **options), out, engines.local(1))
    source = sources.open_source(out, "train")
    return [source[i] for i in range(len(source))]


# Texts


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_a_text_file(encoding, end, tmp_path):
    lines = ["a bear", "", "two\u2028in one", "next\x85line", "form\x0cfeed", "Bär"]
    for last in ("", end):
        (tmp_path / "a.txt").write_bytes((end.join(lines) + last).encode(encoding))
        assert files.read_lines(tmp_path / "a.txt") == lines


@pytest.mark.parametrize("data", [b"B\xe4r", "Bär".encode("utf-16")[:-1], POINTER])
def test_other_files_are_one_error(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(JanusFlowError, match="a.txt"):
        files.read_lines(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_tables_in_every_encoding(encoding, suffix, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPG)
    (tmp_path / "b.jpg").write_bytes(scenes.encoded(quality=70))
    rows = [{"image": "a.jpg", "text": "ein\u2028Bär"}, {"image": "b.jpg", "text": "ein Fuchs"}]
    text = {
        "json": json.dumps(rows, ensure_ascii=False),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "csv": "image,text\n" + "\n".join(",".join(row.values()) for row in rows),
    }[suffix]
    (tmp_path / f"rows.{suffix}").write_bytes(text.encode(encoding))
    got = prepared("folder", tmp_path, tmp_path / "out", rows=str(tmp_path / f"rows.{suffix}"))
    assert [record["captions"] for record in got] == [[row["text"]] for row in rows]


@pytest.mark.parametrize("header", ["image,text", "image;text", "image, text", ",image,text"])
def test_tables_of_spreadsheets(header, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPG)
    line = header.replace("image", "a.jpg").replace("text", '"a bear, red"')
    (tmp_path / "rows.csv").write_text(f"{header}\r\n{line}\r\n")
    got = prepared("folder", tmp_path, tmp_path / "out", rows=str(tmp_path / "rows.csv"))
    assert [record["captions"] for record in got] == [["a bear, red"]]


# Names and files


def test_names_with_numbers_are_in_the_order_of_the_numbers(tmp_path):
    names = ["a1", "a10", "a2", "a" + "9" * 5000, "a010"]
    assert sorted(names, key=inputs.natural_key) == ["a1", "a2", "a010", "a10", names[3]]
    frames = [scenes.encoded(quality=50 + i) for i in range(12)]
    turns = [{"from": "human", "value": "<image>" * 12}, {"from": "gpt", "value": "Red."}]
    for shard in (10, 9):
        members = [(f"{shard}.{i}.jpg", frame) for i, frame in enumerate(frames)]
        talk = (f"{shard}.json", json.dumps({"conversations": turns}).encode())
        (tmp_path / f"{shard}.tar").write_bytes(bad_tars.tar(*members, talk))
    got = prepared("webdataset", tmp_path, tmp_path / "out", kind="conversation")
    assert [record["id"] for record in got] == ["9", "10"]
    assert got[0]["images"] == got[1]["images"] == frames


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train[1].txt", ["train[1].txt"]),
        ("train[1]*.txt", ["train[1].txt", "train[1]b.txt"]),
        ("train[0-1]*", ["train1.txt"]),
        ("*.txt", ["train1.txt", "train[1].txt", "train[1]b.txt"]),
    ],
)
def test_brackets_in_names_and_patterns(pattern, names, tmp_path):
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    for name in ("train[1].txt", "train[1]b.txt", "train1.txt", ".hidden.txt"):
        (folder / name).write_text("x")
    for base in (folder, tmp_path / "*"):
        found = inputs.files([str(base / pattern)], (".txt",))
        assert [name for _, name in found] == names


def test_a_folder_of_other_files_says_what_it_holds(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(JanusFlowError, match=r"1 \.tar"):
        inputs.files([str(tmp_path)], (".parquet",))


@pytest.mark.parametrize("what", ["image", "caption", "tar", "parquet", "json", "text"])
@pytest.mark.parametrize("kind", ["pipe", "pointer"])
def test_pipes_do_not_wait_and_pointers_are_recognized(what, kind, tmp_path):
    form, suffix = {
        "image": ("folder", "jpg"),
        "caption": ("folder", "txt"),
        "tar": ("webdataset", "tar"),
        "parquet": ("parquet", "parquet"),
        "json": ("llava", "json"),
        "text": ("text", "txt"),
    }[what]
    source = tmp_path / "in"
    source.mkdir()
    if form == "folder":
        (source / "a.jpg").write_bytes(JPG)
        (source / "a.txt").write_text("a bear")
        (source / f"a.{suffix}").unlink()
    if kind == "pipe":
        os.mkfifo(source / f"a.{suffix}")
    else:
        (source / f"a.{suffix}").write_bytes(POINTER)
    options = Options(form, (str(source),), kind=build.FORMATS[form].KINDS[0])
    reason = "not a file" if kind == "pipe" else "Git LFS pointer"
    with pytest.raises(JanusFlowError, match=reason):
        build.prepare(options, tmp_path / "out", engines.local(1))


@pytest.mark.parametrize(
    "read",
    [
        lambda path: checksums.read_json(path / "tokenizer.json"),
        lambda path: chat_format.ChatFormat.load(path),
        lambda path: images.read(path / "tokenizer.json"),
    ],
)
def test_pointers_in_place_of_other_files(read, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(JanusFlowError, match="git lfs pull"):
        read(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("é.jpg", unicodedata.normalize("NFD", "é.jpg")),
        (unicodedata.normalize("NFD", "ö/é.jpg"), unicodedata.normalize("NFC", "ö/é.jpg")),
        ("sub/a.jpg", "sub\\a.jpg"),
        ("sub/é.jpg", unicodedata.normalize("NFD", "sub\\é.jpg")),
        ("sub/a.jpg", "./sub/a.jpg"),
        ("sub/a.jpg", "FOLDER/sub/a.jpg"),
        ("a\\b.jpg", "a\\b.jpg"),
    ],
)
def test_names_that_are_equal_to_people(name, spelled, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(JPG)
    row = {"image": spelled.replace("FOLDER", str(tmp_path)), "caption": "a bear"}
    record, _ = records.to_record(row, "place", Options("llava", (), images=str(tmp_path)))
    assert record["image"] == JPG


@pytest.mark.parametrize("name", ["/etc/passwd", "C:\\a.jpg", "..\\a.jpg", "FOLDER/../a.jpg"])
def test_names_outside_the_folder(name, tmp_path):
    row = {"image": name.replace("FOLDER", str(tmp_path)), "caption": "a bear"}
    assert outcome(row, images=str(tmp_path)) == "image: outside its folder"


def test_a_pair_in_two_unicode_forms(tmp_path):
    for suffix, form, data in (("jpg", "NFD", JPG), ("txt", "NFC", b"a bear")):
        (tmp_path / unicodedata.normalize(form, f"é.{suffix}")).write_bytes(data)
    assert [r["captions"] for r in prepared("folder", tmp_path, tmp_path / "out")] == [["a bear"]]


# Fields


TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
MARKED = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "good"),
        ({"image": ""}, "good"),
        ({"video": "", "videos": [], "audio": None}, "good"),
        ({"url": "https://example.org/a.jpg", "image_id": 7, "title": "a video"}, "good"),
        ({"video": "a.mp4"}, "video: not read"),
        ({"video": "clip 7"}, "video: not read"),
        ({"videos": ["a.mp4"]}, "video: not read"),
        ({"clip": "a.webm"}, "video: not read"),
        ({"image": "a.mp4", "conversations": MARKED}, "video: not read"),
        ({"audio": {"path": "a.wav", "bytes": None}}, "audio: not read"),
        ({"speech_file": "a.flac"}, "audio: not read"),
        ({"image_file": "a.jpg"}, "image: in another field"),
        ({"image_url": "https://example.org/a.jpg"}, "image: in another field"),
        ({"photo": b"\xff\xd8"}, "image: in another field"),
    ],
)
def test_media_that_nobody_reads(fields, reason):
    row = {"conversations": TALK, **fields}
    assert outcome(row, kind="conversation", images="folder") == reason


@pytest.mark.parametrize(
    ("fields", "options", "reason"),
    [
        ({"image_path": "a.jpg", "image_url": "https://e.org/a.jpg", "width": 9}, {}, "good"),
        ({"images": [JPG]}, {}, "good"),
        ({"image2": "b.jpg"}, {}, "image: in another field"),
        ({"mask_image": b"\xff\xd8"}, {}, "image: in another field"),
        ({"image2": "b.jpg"}, {"image_field": "image"}, "good"),
        ({"video": "a.mp4"}, {"image_field": "image"}, "video: not read"),
        ({}, {"image_field": "photo"}, "image: missing"),
        ({}, {"text_field": "alt"}, "caption: missing"),
        ({}, {"id_field": "nr"}, "id: missing"),
        ({"raw": [{"text": "a bear"}]}, {"text_field": "raw/text"}, "good"),
    ],
)
def test_fields_beside_an_image(fields, options, reason):
    assert outcome({"image": JPG, "caption": "a bear", **fields}, **options) == reason


@pytest.mark.parametrize("text", ["Rename it a.jpg", "https://e.org/a.mp4", "It is a.wav"])
def test_a_text_that_ends_like_a_file_is_text(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    assert outcome({"conversations": turns}, kind="conversation") == "good"
    assert outcome({"text": text}, kind="document") == "good"
    assert outcome({"caption": text, "image": JPG}) == "good"


def test_images_inside_turns():
    user = {"role": "<|User|>", "content": "<image>What?", "images": [JPG]}
    parts = {"role": "user", "content": [{"type": "image", "image": JPG}, "What?"]}
    answer = {"role": "<|Assistant|>", "content": "Red."}
    for question in (user, parts):
        row: dict = {"conversations": [question, answer]}
        options = Options("llava", (), kind="conversation")
        assert records.to_record(row, "place", options)[0]["images"] == [JPG]
        row["images"] = [scenes.encoded(quality=70)]
        assert outcome(row, kind="conversation") == "image: in another field"
    video = {"role": "user", "content": "What?", "video": "a.mp4"}
    pair = {"user": "What?", "assistant": "Red.", "video": "a.mp4"}
    for turns in ([video, answer], [pair]):
        assert outcome({"messages": turns}, kind="conversation") == "video: not read"


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}],
        {"from": ["human", "gpt"], "value": ["What?", "Red."]},
        {"role": ["user", "assistant"], "content": ["What?", "Red."]},
        [{"user": "What?", "assistant": "Red."}],
        {"user": ["What?"], "assistant": ["Red."]},
    ],
)
@pytest.mark.parametrize("spelling", ["columns", "json", "bytes"])
def test_turns_in_every_spelling(turns, spelling, tmp_path):
    text = json.dumps(turns)
    value = {"columns": turns, "json": text, "bytes": text.encode()}[spelling]
    pq.write_table(pa.Table.from_pylist([{"conversations": value}]), tmp_path / "a.parquet")
    assert parquet.guess_kind([str(tmp_path)]) == "conversation"
    (got,) = prepared("parquet", tmp_path, tmp_path / "out", kind="conversation")
    assert got["conversation"] == {"role": ["user", "assistant"], "content": ["What?", "Red."]}


@pytest.mark.parametrize(
    ("image_field", "want"),
    [("", "image: more than one"), ("jpg", "good"), ("gif", "image: missing")],
)
def test_several_images_of_a_sample(image_field, want, tmp_path):
    members = [("a.jpg", JPG), ("a.mask.png", scenes.encoded("PNG")), ("a.txt", b"a bear")]
    (tmp_path / "a.tar").write_bytes(bad_tars.tar(*members))
    options = Options("webdataset", (str(tmp_path / "a.tar"),), image_field=image_field)
    ((_, result),) = build.read_all(options)
    if want == "good":
        assert not isinstance(result, Skipped) and result[0]["image"] == JPG
    else:
        assert isinstance(result, Skipped) and result.reason == want
        assert "jpg, mask.png, txt" in result.detail  # what there is


def test_a_reason_says_what_helps():
    table = report.Report()
    table.skip("a:1", Skipped("id: duplicate"))
    table.skip("a.txt", Skipped("caption: not UTF-8"))
    assert "-> save the file as UTF-8" in table.table() and "-> `ids`" in table.table()


@pytest.mark.parametrize(
    "arguments",
    [
        ["folder", "in", "--text-field", "alt"],
        ["folder", "in", "--classes", "classes.txt"],
        ["text", "in", "--max-side", "64"],
        ["text", "in", "--images", "in"],
        ["webdataset", "in", "--id-field", "nr"],
        ["webdataset", "in", "--shard-records", "9"],
        ["llava", "in", "--documents", "file"],
        ["llava", "in", "--engine", "beam", "--workers", "99"],
        ["llava", "in", "--beam=--runner=x"],
        ["llava", "in", "--id-field", "nr", "--ids", "place"],
    ],
)
def test_an_option_that_nobody_reads_is_an_error(arguments, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "classes.txt").write_text("bear")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments, "--out", "out"])
    with pytest.raises(JanusFlowError, match="leave "):
        runpy.run_path(str(TOOL))["main"]()


def test_files_of_the_same_name_in_several_folders(tmp_path, monkeypatch):
    for language in ("de", "en"):
        (tmp_path / "in" / language).mkdir(parents=True)
        text = "".join(json.dumps({"text": f"{language} document {i}"}) + "\n" for i in range(3))
        (tmp_path / "in" / language / "train.jsonl").write_text(text)
    (tmp_path / "in" / "other.txt").write_text("one more\n")
    records = prepared("text", tmp_path / "in" / "*" / "train.jsonl", tmp_path / "a", kind="text")
    assert len(records) == 6 and "de/train.jsonl@0" in {x["id"] for x in records}
    names = [name for _, name in inputs.files((str(tmp_path / "in"),), (".jsonl", ".txt"))]
    assert names == ["de/train.jsonl", "en/train.jsonl", "other.txt"]
    monkeypatch.chdir(tmp_path / "in")
    names = [name for _, name in inputs.files(("de", "en", "other.txt"), (".jsonl",))]
    assert names == ["de/train.jsonl", "en/train.jsonl", "other.txt"]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "c4-train.00000.json", "a.JSON.GZ"])
def test_lines_of_json_by_other_names(name, tmp_path):
    data = b'{"text": "Hello.", "url": "http://x"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    records = prepared("text", tmp_path / name, tmp_path / "out", kind="text")
    assert [x["text"] for x in records] == ["Hello."]
