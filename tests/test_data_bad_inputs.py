"""Every format with bad and odd input, from the tables in tests/helpers.

Each case is skipped and counted with its reason, or is good and comes out right. None ends a run,
and the counts of each run are exact, so none passes silently.
"""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from helpers import bad_folder, bad_tables, bad_tars, bad_texts, scenes

from janusflow_jax.data import images, sources
from janusflow_jax.data.prepare import build, engines, report as prepare_report
from janusflow_jax.data.prepare.records import Options

HUB = Path(__file__).parent / "data" / "golden" / "tiny" / "janusflow"


def run(monkeypatch, tmp_path, form: str, inputs: list[Path], **options):
    """(records by id, [(where, reason)], report) of one import."""
    monkeypatch.setattr(prepare_report, "EXAMPLES", 10_000)
    given = {"tokenizer": str(HUB), "shard_records": 7, "max_bytes": bad_folder.MAX_BYTES}
    given |= {"max_chars": bad_folder.MAX_CHARS, **options}
    opts = Options(form, tuple(map(str, inputs)), **given)
    out = tmp_path / "out"
    report = build.prepare(opts, out, engines.local(1))
    source = sources.open_source(out, "train")
    records = {record["id"]: record for record in (source[i] for i in range(len(source)))}
    assert len(records) == len(source) == report.num_records
    skips = [
        (where, reason)
        for reason, found in report.skipped.items()
        for where, _ in found["examples"]
    ]
    assert len(skips) == report.num_skipped
    return records, skips, report


def outcome(expected) -> list[str]:
    """What a case must give, sorted; every kind of good is good."""
    expected = [expected] if isinstance(expected, str) else expected
    return sorted("good" if e.startswith("good") else e for e in expected)


def compare(cases, got: dict[str, list[str]]) -> None:
    """All cases at once, so that one wrong does not hide the others."""
    wrong = [
        f"{name}: expected {outcome(expected)}; got {sorted(got.get(name, []))}"
        for name, _, expected in cases
        if sorted(got.get(name, [])) != outcome(expected)
    ]
    unknown = sorted(set(got) - {name for name, _, _ in cases})
    assert not wrong and not unknown, "\n".join([*wrong, *map(str, unknown)])


def stem(where: str) -> str:
    """The case's name in 'x/name.jpg', 'name.tar:key' and so on."""
    return where.rsplit("/", 1)[-1].split(":")[0].split("@")[0].split(".")[0]


def gathered(records, skips, name_of=stem, id_of=lambda record_id: stem(record_id)):
    got = collections.defaultdict(list)
    for record_id in records:
        got[id_of(record_id)].append("good")
    for where, reason in skips:
        got[name_of(where)].append(reason)
    return got


def test_folder_of_pairs(monkeypatch, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, make, _ in bad_folder.PAIRS:
        make(folder, name)
    records, skips, _ = run(monkeypatch, tmp_path, "folder", [folder])
    compare(bad_folder.PAIRS, gathered(records, skips))
    for name, _, expected in bad_folder.PAIRS:
        if expected in (bad_folder.GOOD, bad_folder.GREY):
            (record,) = (r for i, r in records.items() if stem(i) == name)
            pixels = images.decode(record["image"])
            assert scenes.looks_right(pixels, grey=expected == bad_folder.GREY), name
    assert records["rgba"]["image"] == (folder / "rgba.png").read_bytes()  # kept as it is
    clear = images.decode(records["rgba"]["image"])
    assert (clear[64 // 5, 96 // 6] == 255).all()  # what is transparent lies on white
    assert records["caption_crlf"]["captions"] == ["a red\nwall"]
    assert records["caption_bom"]["captions"] == ["a red wall"]
    assert records["caption_with_tags"]["captions"] == ["<image_placeholder><image> a wall"]


def rows_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.jpg").write_bytes(bad_folder.JPG)
    (folder / "half.jpg").write_bytes(bad_folder.JPG[:700])
    (tmp_path / "secret.jpg").write_bytes(bad_folder.JPG)
    return folder


def test_folder_with_json_lines(monkeypatch, tmp_path):
    folder, cases = rows_folder(tmp_path), bad_folder.ROWS
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\n".join(make(name) for name, make, _ in cases) + b"\n")
    records, skips, report = run(monkeypatch, tmp_path, "folder", [folder], rows=str(rows))
    ids = {"17": "id_number"} | {f"rows.jsonl-{i}": c[0] for i, c in enumerate(cases, 1)}
    got = gathered(
        records,
        skips,
        lambda where: cases[int(where.rpartition(":")[2]) - 1][0],
        lambda record_id: ids.get(record_id, record_id),
    )
    compare(cases, got)
    assert records["captions_some_bad"]["captions"] == ["a wall"]
    assert {r: f["count"] for r, f in report.dropped.items()} == {
        "caption: empty": 1,
        "caption: missing": 1,
    }


@pytest.mark.parametrize("separator", [b",", b"\t"])
def test_folder_with_csv(monkeypatch, tmp_path, separator):
    folder, cases = rows_folder(tmp_path), bad_folder.CSV
    rows = tmp_path / ("rows.csv" if separator == b"," else "rows.tsv")
    lines = [b"id,image,caption", *(line for _, line, _ in cases)]
    rows.write_bytes(b"\r\n".join(lines).replace(b",", separator))
    records, skips, _ = run(monkeypatch, tmp_path, "folder", [folder], rows=str(rows))
    ends, at = {}, 1
    for name, line, _ in cases:
        at += 1 + line.count(b"\n")
        ends[at] = name
    compare(cases, gathered(records, skips, lambda where: ends[int(where.rpartition(":")[2])]))


def test_webdataset(monkeypatch, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    bad_tars.write(folder)
    before = sorted(tmp_path.rglob("*"))
    records, skips, _ = run(
        monkeypatch, tmp_path, "webdataset", [folder], ids="place", classes=("dog", "cat")
    )
    first = lambda place: place.split(".tar")[0]  # noqa: E731
    got = gathered(records, skips, first, first)
    compare(bad_tars.CASES, got)
    made = [p for p in tmp_path.rglob("*") if p not in before]
    assert all((tmp_path / "out") in (p, *p.parents) for p in made)  # nothing is extracted
    assert not Path("/nowhere").exists()
    assert records["wds_class.tar/wds_class"]["captions"] == ["cat"]
    assert records["wds_class_word.tar/wds_class_word"]["captions"] == ["tabby cat"]
    for record in records.values():
        assert scenes.looks_right(images.decode(record["image"])), record["id"]


def test_parquet(monkeypatch, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    bad_tables.write(folder)
    records, skips, _ = run(monkeypatch, tmp_path, "parquet", [folder])
    got = gathered(
        records,
        skips,
        id_of=lambda i: {"123456789": "pq_number_id"}.get(i, i.rpartition("-")[0] or i),
    )
    compare(bad_tables.CASES, got)
    assert records["pq_captions_nulls-0"]["captions"] == ["red"]
    for record in records.values():
        assert scenes.looks_right(images.decode(record["image"])), record["id"]


def test_llava(monkeypatch, tmp_path):
    folder = rows_folder(tmp_path)
    talks = tmp_path / "talks.json"
    talks.write_text("[" + ",\n".join(make(name) for name, make, _ in bad_texts.TALKS) + "]")
    names = [name for name, _, _ in bad_texts.TALKS]
    two = names.index("talk_no_comma")  # two elements
    names.insert(two, names[two])
    records, skips, _ = run(
        monkeypatch,
        tmp_path,
        "llava",
        [talks],
        kind="conversation",
        images=str(folder),
        lengths=("understand:chat",),
        max_chars=bad_texts.COUNT,
    )
    got = gathered(
        records,
        skips,
        lambda where: names[int(where.rpartition("[")[2].removesuffix("]"))],
        lambda i: i.removesuffix("_b"),
    )
    compare(bad_texts.TALKS, got)
    tag, turns = "<image_placeholder>", {i: r["conversation"] for i, r in records.items()}
    question = f"{tag}\nWhat is it?"
    for name in ("talk_llava", "talk_openai", "talk_pairs", "talk_as_text", "talk_last_question"):
        assert turns[name] == {"role": ["user", "assistant"], "content": [question, "A wall."]}
    assert turns["talk_mark_in_answer"]["content"][1] == f"I see <image> and {tag}."
    assert turns["talk_two_images"]["content"][0] == f"{tag}{tag}\nSame?"
    assert turns["talk_system"]["role"] == ["system", "user", "assistant"]
    assert [len(records[i]["images"]) for i in ("talk_text_only", "talk_two_images")] == [0, 2]
    assert scenes.looks_right(images.decode(records["talk_llava"]["images"][0]))


def test_files_of_conversations(monkeypatch, tmp_path):
    folder, cases = rows_folder(tmp_path), bad_texts.JSON_FILES
    talks = tmp_path / "talks"
    talks.mkdir()
    bad_texts.write(talks, cases)
    records, skips, _ = run(
        monkeypatch,
        tmp_path,
        "llava",
        [talks],
        kind="conversation",
        images=str(folder),
        lengths=("understand:chat",),
    )
    compare([(stem(name), data, want) for name, data, want in cases], gathered(records, skips))


@pytest.mark.parametrize("shard_bytes", [2**20, 200])
def test_texts(monkeypatch, tmp_path, shard_bytes):
    folder, cases = tmp_path / "in", bad_texts.TEXTS
    folder.mkdir()
    bad_texts.write(folder, cases)
    records, skips, _ = run(
        monkeypatch,
        tmp_path,
        "text",
        [folder],
        kind="text",
        lengths=("text:plain",),
        max_document=bad_texts.COUNT,
        shard_bytes=shard_bytes,
    )
    compare([(stem(name), data, want) for name, data, want in cases], gathered(records, skips))
    assert records["text_lines.txt@14"]["text"] == "another"
    assert records["text_tags.txt@0"]["text"].startswith("<image_placeholder> <image>")
