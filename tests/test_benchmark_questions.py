"""Questions of benchmarks: all published forms read alike; damaged files say what is wrong."""

import base64
import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from experiments import easy_vqa
from janusflow_jax.config.errors import DataError
from janusflow_jax.data.prepare import parquet
from janusflow_jax.eval.benchmarks import answer, read, registry


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def encoded(value: int) -> str:
    return base64.b64encode(png(value)).decode()


@pytest.fixture
def images(tmp_path):
    """A folder of two images, under all names that the official forms use."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in (1, 2):
        for name in (
            f"COCO_val2014_{n:012d}.jpg",
            f"COCO_test2015_{n:012d}.jpg",
            f"{n}.jpg",
            f"{n}",
        ):
            (folder / name).write_bytes(png(n))
    return folder


def write_tsv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows, group=1000):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def summary(data):
    """What must not depend on the form: texts, answers, options, hints, categories, red values."""
    red = {key: int(read.pixels(source)[0, 0, 0]) for key, source in data.images.items()}
    return [
        (q.text, q.answer, dict(q.options), q.hint, [red[key] for key in q.images])
        for q in data.questions
    ]


def hub(n):
    return {"bytes": png(n), "path": None}


def forms(tmp_path):
    """Benchmark -> the same questions in each of its forms."""
    t = tmp_path
    yes_no = [("Is it red?", "yes", 1), ("Is it blue?", "no", 1), ("Is it a bus?", "no", 2)]
    (t / "coco_pope_random.json").write_text(
        "".join(
            json.dumps({"question_id": i, "image": f"{n}.jpg", "text": q, "label": a}) + "\n"
            for i, (q, a, n) in enumerate(yes_no)
        )
    )
    tsv = [
        {"index": i, "image": encoded(n), "question": q, "answer": a.title(), "category": "random"}
        for i, (q, a, n) in enumerate(yes_no)
    ]
    tsv[1]["image"] = "0"  # the image of row 0
    rows = [
        {"question_id": str(i), "question": q, "answer": a, "image": hub(n), "category": "random"}
        for i, (q, a, n) in enumerate(yes_no)
    ]
    yield (
        "pope",
        [
            t / "coco_pope_random.json",
            write_tsv(t / "POPE.tsv", tsv),
            write_parquet(t / "pope" / "test.parquet", rows),
        ],
    )

    task = t / "release" / "color"
    (task / "questions_answers_YN").mkdir(parents=True)
    (task / "images").mkdir()
    (task / "images" / "7.png").write_bytes(png(1))
    pair = [("Is it red? Please answer yes or no.", "Yes"), ("Is it blue?", "No")]
    text = "".join(f"{q}\t{a}\n" for q, a in pair)
    (task / "questions_answers_YN" / "7.txt").write_text(text)
    rows = [
        {"question_id": "color/7.png", "question": q, "answer": a, "category": "color"}
        for q, a in pair
    ]
    tsv = [{**row, "index": i, "image": encoded(1)} for i, row in enumerate(rows)]
    parquet = write_parquet(t / "mme" / "0.parquet", [{**row, "image": hub(1)} for row in rows])
    yield "mme", [t / "release", write_tsv(t / "MME.tsv", tsv), parquet]

    row = {"question": "What?", "A": "cat", "B": "dog", "answer": "B", "category": "x"}
    tsv = [{"index": i, "hint": h, **row, "image": encoded(1)} for i, h in ((1, ""), (2, "Look."))]
    rows = [
        {"index": str(i), "hint": h, **row, "C": "nan", "image": hub(1)}
        for i, h in ((1, "nan"), (2, "Look."))
    ]
    parquet = write_parquet(t / "mmb" / "0.parquet", rows)
    yield "mmbench-dev-en", [write_tsv(t / "MMBench_DEV_EN.tsv", tsv), parquet]

    row = {"question_id": "9", "question": "What?", "choice_a": "cat", "choice_b": "dog"}
    row |= {"answer": "A", "question_type_id": 3}
    official = [{**row, "data_id": "1", "data_type": kind} for kind in ("image", "video")]
    official[1]["question_id"] = "10"
    (t / "SEED-Bench.json").write_text(json.dumps({"questions": official}))
    tsv = [{"index": 9, "question": "What?", "A": "cat", "B": "dog", "answer": "A"}]
    tsv[0] |= {"category": "3", "image": encoded(1)}
    rows = [{**x, "image": [hub(1)]} for x in official]
    parquet = write_parquet(t / "seed" / "0.parquet", rows)
    yield "seed-image", [t / "SEED-Bench.json", write_tsv(t / "SEED.tsv", tsv), parquet]

    asked = [{"question_id": 5, "image_id": 1, "question": "Color?"}]
    golds = [{"answer": "red", "answer_id": n} for n in range(10)]
    extra = {"answers": golds, "answer_type": "other"}
    folder = t / "vqa"
    folder.mkdir()
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps({"data_subtype": "val2014", "questions": asked})
    )
    (folder / "v2_mscoco_val2014_annotations.json").write_text(
        json.dumps({"annotations": [{"question_id": 5, **extra}]})
    )
    parquet = write_parquet(t / "vqa_hub" / "0.parquet", [{**asked[0], **extra, "image": hub(1)}])
    yield "vqav2-val", [folder, parquet]

    row = {"imageId": "1", "question": "Color?", "answer": "red"}
    (t / "testdev_balanced_questions.json").write_text(json.dumps({"201": row}))
    tsv = [{"index": 201, "image": encoded(1), "question": "Color?", "answer": "red"}]
    write_parquet(t / "gqa" / "images.parquet", [{"id": "1", "image": hub(1)}])
    write_parquet(t / "gqa" / "instructions.parquet", [{"id": "201", **row}])
    yield (
        "gqa",
        [
            t / "testdev_balanced_questions.json",
            write_tsv(t / "GQA.tsv", tsv),
            t / "gqa",
        ],
    )

    row = {"question": "See <image 1>.", "answer": "B"}
    ids = ("validation_Art_1", "validation_Art_2")
    tsv = [
        {"index": 1, "id": ids[0], **row, "A": "x", "B": "y"},
        {"index": 2, "id": ids[1], **row, "A": "", "B": ""},
        {"index": 3, "id": "dev_Art_1", **row, "A": "x", "B": "y"},
    ]
    splits, two = ("validation", "validation", "dev"), str([encoded(1), encoded(2)])
    tsv = [{**x, "split": s, "image": two} for x, s in zip(tsv, splits, strict=True)]
    rows = [
        {"id": i, **row, "options": o, "image_1": hub(1), "image_2": hub(2), "image_3": None}
        for i, o in zip(ids, ("['x', 'y']", "[]"), strict=True)
    ]
    write_parquet(t / "mmmu" / "test-0.parquet", [{**rows[0], "id": "test_Art_1"}])
    parquet = write_parquet(t / "mmmu" / "validation-0.parquet", rows).parent
    yield "mmmu-val", [write_tsv(t / "MMMU_DEV_VAL.tsv", tsv), parquet]

    row = {"question": "Why?", "answer": "so"}
    (t / "mm-vet.json").write_text(json.dumps({"v1_0": {**row, "imagename": "1.jpg"}}))
    tsv = write_tsv(t / "MMVet.tsv", [{"index": 0, **row, "image": encoded(1)}])
    parquet = write_parquet(
        t / "vet" / "0.parquet", [{"question_id": "v1_0", **row, "image": hub(1)}]
    )
    yield "mmvet", [t / "mm-vet.json", tsv, parquet]


def test_every_form_reads_alike(tmp_path, images):
    seen = set()
    for name, paths in forms(tmp_path):
        seen.add(name)
        first, *others = [read.read(registry.get(name), path, images) for path in paths]
        assert summary(first) and first.about["rows"] and len(first.about["sha256"]) == 64
        for other in others:
            assert summary(other) == summary(first), name
            if name not in ("seed-image", "mme"):  # whose ids differ from form to form
                ids = [q.id.rsplit("/")[-1] for q in other.questions]
                assert ids == [q.id.rsplit("/")[-1] for q in first.questions], name
    assert {*registry.BENCHMARKS} - seen == {
        *("vqav2-testdev", "geneval", "geneval2", "dpg", "mjhq-fid30k", "mjhq-fid10k", "wise")
    }


def test_images_of_parquet_stay_in_the_file(tmp_path, monkeypatch):
    rows = [
        {"question_id": str(n), "question": f"{n}?", "answer": "yes", "category": "random"}
        for n in range(9)
    ]
    rows = [row | {"image": hub(n // 2 + 1)} for n, row in enumerate(rows)]
    path = write_parquet(tmp_path / "0.parquet", rows, group=4)
    data = read.read(registry.get("pope"), path)
    assert not any(isinstance(x, bytes) for x in data.images.values())
    groups, column = [], parquet.column
    monkeypatch.setattr(parquet, "column", lambda *args: groups.append(args[1]) or column(*args))
    keys = [q.images[0] for q in data.questions]
    assert [data.images[key].read_bytes() for key in keys] == [png(n // 2 + 1) for n in range(9)]
    assert len(data.images) == 5
    assert groups == [0, 1, 2]  # each once
    path.write_bytes(path.read_bytes()[:-8])
    read._column.cache_clear()
    with pytest.raises(DataError, match="download it again"):
        data.images[keys[0]].read_bytes()


def test_a_row_of_several_splits_is_a_question_of_each(tmp_path):
    row = {"index": 3, "image": encoded(1), "question": "Is it?", "answer": "Yes"}
    path = write_tsv(tmp_path / "POPE.tsv", [{**row, "category": "random,popular"}])
    questions = read.read(registry.get("pope"), path).questions
    assert [q.category for q in questions] == ["random", "popular"]
    assert len({q.id for q in questions}) == 2


def test_which_file_it_is(tmp_path, images, monkeypatch):
    paths = dict(forms(tmp_path))["pope"]
    benchmark = registry.get("pope")
    assert read.read(benchmark, paths[0], images).about["known"] == ""  # 3 rows instead of 3,000
    files = (registry.DataFile("coco_pope_random.json", 3),)
    known = lambda path: read.read(  # noqa: E731
        registry.dataclasses.replace(benchmark, files=files), path, images
    ).about["known"]
    assert known(paths[0]) == "coco_pope_random.json" and known(paths[1]) == ""
    md5 = read.read(benchmark, paths[1]).about["md5"]
    files = (registry.DataFile("POPE.tsv", 0, f"md5:{md5}"),)
    assert known(paths[1]) == "POPE.tsv"
    paths[1].write_text(paths[1].read_text().replace("bus", "car"))
    assert known(paths[1]) == ""


def broken(tmp_path, name):
    """(benchmark, path) of damaged data."""
    row = {"index": 1, "question": "What?", "A": "cat", "B": "dog", "answer": "A"}
    rows = [{**row, "category": "x", "image": encoded(1), "split": "dev"}]
    if name == "unknown split":
        rows[0]["answer"] = ""
    if name == "duplicate":
        rows *= 2
    if name == "no such index":
        rows[0]["image"] = "77"
    path = write_tsv(tmp_path / "MMBench.tsv", rows)
    text = path.read_text()
    if name == "truncated row":
        path.write_text(text[: text.index(encoded(1))])
    if name == "truncated image":
        path.write_text(text.replace(encoded(1), encoded(1)[:-3]))
    if name == "missing image":
        path = tmp_path / "coco_pope_random.json"
        path.write_text(
            json.dumps({"question_id": 1, "image": "no.jpg", "text": "?", "label": "no"})
        )
        return "pope", path
    if name == "no annotations":
        path = dict(forms(tmp_path))["vqav2-val"][0]
        (path / "v2_mscoco_val2014_annotations.json").unlink()
        return "vqav2-val", path
    if name == "another benchmark":
        return "vqav2-val", path
    if name == "answers of another":
        return "mme", path
    if name == "truncated Parquet":
        path = dict(forms(tmp_path))["vqav2-val"][1]
        path.write_bytes(path.read_bytes()[:-9])
        return "vqav2-val", path
    if name == "no file":
        return "pope", tmp_path / "none"
    return "mmbench-dev-en", path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown split", "dev"),
        ("duplicate", "'1' more than once"),
        ("no such index", "'77'"),
        ("truncated row", "truncated"),
        ("truncated image", "base64"),
        ("missing image", "no.jpg"),
        ("no annotations", "annotations"),
        ("another benchmark", "expected the columns of"),
        ("answers of another", "yes or no"),
        ("truncated Parquet", "Parquet"),
        ("no file", "there is no"),
    ],
)
def test_damaged_data_are_one_clear_error(tmp_path, images, name, message):
    benchmark, path = broken(tmp_path, name)
    with pytest.raises(DataError, match=message) as error:
        data = read.read(registry.get(benchmark), path, images)
        assert data.questions == []
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_pixels_are_those_of_the_published_code():
    image = Image.new("RGBA", (4, 2), (200, 10, 10, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    published = read.pixels(file.getvalue())
    assert published.shape == (2, 4, 3) and published[0, 0].tolist() == [200, 10, 10]
    own = read.pixels(file.getvalue(), "own")
    assert own.shape == (4, 2, 3) and own[0, 0].tolist() == [255, 255, 255]
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    np.testing.assert_array_equal(read.pixels(file.getvalue()), noise)
    assert (read.pixels(file.getvalue(), "vlmevalkit") != noise).any()
    with pytest.raises(DataError, match="image"):
        read.pixels(b"text")


def test_prompts_are_those_of_the_authors():
    letters = {"A": "circle", "B": "star"}
    choice = read.Question("1", "What is it?", (), "A", letters)
    text = "Is it? Please answer yes or no."
    ask = lambda name, question, protocol="janus": answer.request(name, question, protocol)  # noqa: E731
    assert ask("mmbench-dev-en", choice).text == (
        "\nWhat is it?\nA. circle\nB. star\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    hinted = read.Question("1", "What is it?", (), "A", {}, "Look.")
    assert ask("mmmu-val", hinted).text == (
        "\nHint: Look.\nWhat is it?\nAnswer the question directly. "
    )
    short = "\nAnswer the question using a single word or phrase."
    question = read.Question("1", text, ())
    assert ask("pope", question).text == f"\nIs it?{short}"
    assert ask("mme", question).text == f"\n{text}{short}"
    assert ask("mme", question).system == "" and ask("mmvet", question).system
    assert ask("mme", question, "janus-system").system.startswith("You are a helpful language")
    assert ask("gqa", question, "vlmevalkit").text == f"{text}{short}"


def test_easy_vqa_in_the_forms_of_the_benchmarks(tmp_path, monkeypatch):
    asked = [
        ["what is the red shape?", "circle", 0],
        ["is there a circle?", "yes", 0],
        ["is there not a circle?", "no", 0],
    ]
    for split in ("train", "test"):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
        (tmp_path / "data" / split / "questions.json").write_text(json.dumps(asked))
        (tmp_path / "data" / split / "images" / "0.png").write_bytes(png(7))
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["easy_vqa.py", "--data", str(tmp_path / "data"), "--out", str(out)]
    )
    easy_vqa.main()
    pope = read.read(registry.get("pope"), out / "pope.json", out / "images")
    assert [(q.text, q.answer) for q in pope.questions] == [tuple(x[:2]) for x in asked[1:]]
    choices = read.read(registry.get("mmbench-dev-en"), out / "mmbench.tsv").questions
    assert [int(q.id) for q in choices] == [1, 1_000_001, 2_000_001, 3_000_001]
    assert {q.options[q.answer] for q in choices} == {"circle"} and len({*choices[0].options}) == 4
    assert len({q.answer for q in choices}) == 4  # every letter is right once
    short = read.read(registry.get("vqav2-val"), out / "vqav2", out / "images").questions
    assert [q.answer for q in short] == [(x[1],) * 10 for x in asked]
    train = json.loads((out / "train.json").read_text())[0]["conversations"]
    prompt = answer.request("vqav2-val", short[0], "janus").text
    assert train[1]["value"] == f"<image>{prompt}"  # trained with the prompt that is asked
