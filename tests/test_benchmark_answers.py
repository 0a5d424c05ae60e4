"""Answers to the questions of benchmarks: asked once, in fixed batches, resumed, and scored."""

import base64
import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from janusflow_jax import benchmark, pipeline
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.data import chat_format
from janusflow_jax.eval.benchmarks import answer, plan, read, registry, report

SETTINGS = {"protocol": "janus", "pixels": "published", "max_new_tokens": 40, "batch": 4}


def png(value: int, size=(6, 5)) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tmp_path(tmp_path):
    return epath.Path(tmp_path)


def made(texts=("Is it?", "Is it not?", "Is it a very long question that goes on and on and on?")):
    """POPE-like questions about three images; the second split repeats those of the first."""
    images: dict[read.ImageKey, read.ImageSource] = {
        read.ImageKey(hashlib.sha256(png(n)).hexdigest()): png(n) for n in range(3)
    }
    questions = [
        read.Question(f"{split}/{n}/{i}", text, (key,), "yes" if i else "no", category=split)
        for split in ("random", "popular")
        for n, key in enumerate(images)
        for i, text in enumerate(texts)
    ]
    about = {"file": "made", "rows": len(questions), "sha256": "0", "known": "made"}
    return read.Data(questions, images, about)


class Model(pipeline.Pipeline):
    """Answers with the length of the prompt and the red of the image; questions with "not" get
    40 tokens. It counts its calls."""

    def __init__(self):
        text = chat_format.ChatFormat.load("starts/emoji_llm/hub", 2)
        self.text, self.encoded, self.calls = text, [], []

    def understanding_slots(self, images):
        self.encoded.append(len(images))
        return np.stack([np.full((2, 2), float(x[0, 0, 0]), np.float32) for x in images])

    def greedy_tokens(self, prompts, slots, max_new_tokens):
        self.calls.append((len(prompts), max_new_tokens))
        assert slots is not None and len(slots) == len(prompts)
        out = []
        for prompt, vectors in zip(prompts, slots, strict=True):
            size = 50 if "not" in self.text.decode(prompt.ids) else 12
            ids = self.text.text_tokenizer.encode(f"{len(prompt.ids)} {vectors[0, 0]:.0f}").ids
            out.append(((ids * size)[:size] + [self.text.eos_id])[:max_new_tokens])
        return out


def run(model, out, data, settings=SETTINGS, shard=(0, 1)):
    return list(answer.run("pope", data, model, out, settings | {"data": data.about}, shard))


def collected(data, out):
    lines = answer.collect("pope", data, out)
    assert lines is not None
    return lines


def test_equal_questions_are_asked_once_and_images_encoded_once(tmp_path):
    data, model = made(), Model()
    seen = run(model, tmp_path, data)
    assert seen[0] == (0, 9) and seen[-1] == (9, 9)  # 18 questions
    assert {size for size, _ in model.calls} == {4} == {*model.encoded}
    assert sum(model.encoded) <= 8  # three images, in batches of four
    assert (4, 40) in model.calls  # only those that did not end
    lines = collected(data, tmp_path)
    assert [x["id"] for x in lines] == [q.id for q in data.questions]
    assert [x["answer"] for x in lines[:9]] == [x["answer"] for x in lines[9:]]
    long = [x for x, q in zip(lines, data.questions, strict=True) if "not" in q.text]
    assert all(x["truncated"] and x["tokens"] == 40 for x in long)
    assert not any(x["truncated"] for x in lines if x not in long)
    reds = [str(read.pixels(data.images[q.images[0]])[0, 0, 0]) for q in data.questions]
    assert all(red in x["answer"] for x, red in zip(lines, reds, strict=True))
    stored = [json.loads(x) for x in (tmp_path / answer.ANSWERS).read_text().splitlines()]
    assert stored == lines == answer.read_answers(tmp_path / answer.ANSWERS, data)


def test_processes_and_interruptions_give_the_same_file(tmp_path):
    data = made()
    run(Model(), tmp_path / "a", data)
    collected(data, tmp_path / "a")
    for shard in ((1, 2), (0, 2)):
        assert answer.collect("pope", data, tmp_path / "b") is None if shard[0] == 0 else True
        run(Model(), tmp_path / "b", data, shard=shard)
    answer.collect("pope", data, tmp_path / "b")
    marks = sorted((tmp_path / "b" / answer.MANIFEST).glob("0*.json"))
    marks[0].unlink()  # killed before it was written
    assert answer.collect("pope", data, tmp_path / "b") is None
    again = Model()
    run(again, tmp_path / "b", data)
    assert len({n for n, _ in again.calls}) == 1 and len(again.calls) <= 2  # only this batch
    answer.collect("pope", data, tmp_path / "b")
    files = [(tmp_path / x / answer.ANSWERS).read_bytes() for x in "ab"]
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="protocol"):
        run(again, tmp_path / "b", data, SETTINGS | {"protocol": "vlmevalkit"})


def test_answers_of_another_file_are_refused(tmp_path):
    data, path = made(), tmp_path / "answers.jsonl"
    lines = [{"id": q.id, "answer": "Yes"} for q in data.questions]
    for wrong, message in (
        (lines[1:], "got none to 'random/0/0'"),
        ([*lines, lines[0]], "got two"),
        ([{"id": "x"}], "id and answer"),
    ):
        path.write_text("".join(json.dumps(x) + "\n" for x in wrong))
        with pytest.raises(DataError, match=message):
            answer.read_answers(path, data)


def harness_data(tmp_path):
    """A TSV file of VLMEvalKit whose first row belongs to two splits."""
    image = base64.b64encode(png(1)).decode()
    rows = [("4", "A dog?", "Yes", "random,popular"), ("7", 'A "cat"?', "No", "random")]
    text = "index\tquestion\tanswer\tcategory\timage\n"
    path = tmp_path / "POPE.tsv"
    path.write_text(text + "".join("\t".join((*row, image)) + "\n" for row in rows))
    return read.read(registry.get("pope"), path)


def answers_of(path, data):
    lines = answer.read_answers(path, data)
    assert [x["id"] for x in lines] == [q.id for q in data.questions]
    return [x["answer"] for x in lines]


def test_answers_of_vlmevalkit_are_taken_by_row(tmp_path):
    data, path = harness_data(tmp_path), tmp_path / "janusflow_jax_POPE.tsv"
    head = "index\tquestion\tanswer\tcategory\tprediction\n"
    first, second = "4\tA dog?\tYes\t\tyes\n", '7\t"A ""cat""?"\tNo\t\t"No,\nnone"\n'
    path.write_text(head + first + second)
    assert answers_of(path, data) == ["yes", "yes", "No,\nnone"]
    for text, message in (
        (head + second + first, "row 0: expected the data that were asked"),
        (head + first, "got none to 'random/7'"),
        (head.replace("prediction", "other") + first, "column prediction"),
        (head + first + "7\tA cat?\n", "row 1: expected 5 columns; got 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            answer.read_answers(path, data)


def test_an_excel_file_of_vlmevalkit_is_refused(tmp_path):
    data, path = harness_data(tmp_path), tmp_path / "janusflow_jax_POPE.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="PRED_FORMAT=tsv"):
        answer.read_answers(path, data)


def test_answers_of_lmms_eval_are_taken_by_row(tmp_path):
    data, path = harness_data(tmp_path), tmp_path / "20261129_samples_pope.jsonl"
    first = {"doc_id": 0, "target": "yes", "filtered_resps": "Yes."}
    second = {"doc_id": 1, "target": "No", "filtered_resps": ["no"]}

    def write(*lines):
        path.write_text("".join(json.dumps(x) + "\n" for x in lines))

    write(second, first)  # processes write their documents in turn
    assert answers_of(path, data) == ["Yes.", "Yes.", "no"]
    for lines, message in (
        ((first, second | {"target": "yes"}), "line 1: expected the data that were asked"),
        ((first,), "got none to 'random/7'"),
        ((first, second, first), "got two to 'random/4'"),
        (({"doc_id": 0, "target": "yes"},), "a sample of lmms-eval"),
    ):
        write(*lines)
        with pytest.raises(DataError, match=message):
            answer.read_answers(path, data)


def golden_answers(model, data, settings):
    """By `chat`: one question, one image, one pass."""
    out = []
    for question in data.questions:
        one = answer.request("pope", question, settings["protocol"])
        content = model.text.image_tag * len(one.images) + one.text
        turns = [{"role": "System", "content": one.system}, {"role": "User", "content": content}]
        images = [read.pixels(data.images[key]) for key in one.images]
        out.append(model.chat(turns, images, max_new_tokens=settings["max_new_tokens"]))
    return out


@pytest.mark.slow
def test_two_passes_in_batches_equal_chat(tmp_path, golden_model, monkeypatch):
    monkeypatch.setattr(answer, "FIRST_TOKENS", 4)
    data = made(("Is it?", "Describe the image in many words, please: what is where?"))
    data = dataclasses.replace(data, questions=data.questions[:6])
    settings = SETTINGS | {"max_new_tokens": 24}
    run(golden_model, tmp_path, data, settings)
    lines = collected(data, tmp_path)
    assert [x["answer"] for x in lines] == golden_answers(golden_model, data, settings)
    assert any(x["tokens"] > 4 for x in lines)


# --- scores and the report


def answered(data, wrong=()):
    return ["Yes" if (q.answer == "yes") != (q.id in wrong) else "No." for q in data.questions]


def test_pope_is_scored_by_all_rules_and_splits():
    data = made()
    scored = report.score("pope", data.questions, answered(data, {"popular/0/1"}))
    assert [*scored.rules] == ["vlmevalkit", "official", "lmms_eval"]
    main = scored.rules["vlmevalkit"]
    assert main["f1_random"].value == 100 and main["accuracy_popular"].value == pytest.approx(
        800 / 9
    )
    assert main["f1_popular"].value < main["f1_overall"].value < 100
    assert scored.rules["lmms_eval"]["accuracy_random"].value < 100  # "No." is no label there


def test_every_benchmark_has_its_main_score():
    """The names that the registry compares exist, and right answers get the whole score."""
    key = (read.ImageKey("0"),)
    letters = {"A": "cat", "B": "dog"}
    samples = {
        "pope": read.Question("1", "?", key, "yes", category="random"),
        "mmbench-dev-en": read.Question("1", "?", key, "B", letters, category="x"),
        "seed-image": read.Question("1", "?", key, "B", letters, category="x"),
        "vqav2-val": read.Question("1", "?", key, ("two",) * 10, category="number"),
        "gqa": read.Question("1", "?", key, "dog"),
        "mmmu-val": read.Question("1", "?", key, "B", letters, category="Art"),
    }
    for name, question in samples.items():
        gold = question.answer if isinstance(question.answer, str) else question.answer[0]
        scored = report.score(name, [question], [gold])
        for rule, own in scored.rules.items():
            first = [*own.values()][0]
            assert first.value == 100, (name, rule)
        for reported in registry.get(name).published:
            assert reported.score in scored.rules[[*scored.rules][0]], name
    pairs = [
        read.Question(f"{task}/{n}", "?", key, "yes", category=task, group=task)
        for task in report.yesno.PERCEPTION
        for n in range(2)
    ]
    scored = report.score("mme", pairs, ["Yes"] * len(pairs))
    assert scored.rules["official"]["perception"].value == 2000


def settings(data, **changes):
    return SETTINGS | {"system": "", "limit": 0, "data": data.about} | changes


def written(tmp_path, data, lines, **changes):
    text = benchmark.score_answers(
        registry.get("pope"), data, lines, settings(data, **changes), tmp_path
    )
    return text, json.loads((tmp_path / report.REPORT).read_text())


def test_the_report_compares_whole_runs_on_the_known_data_only(tmp_path):
    data = made()
    lines = [{"answer": a, "truncated": False} for a in answered(data)]
    text, out = written(tmp_path, data, lines)
    assert not out["partial"] and "JanusFlow" in text
    assert out["scores"]["f1_random"] == {"value": 100, "low": 100, "high": 100}
    by_source = {x["source"]: x for x in out["compared_with"] if x["score"] == "f1_random"}
    assert by_source["JanusFlow, arXiv 2411.07975"]["value"] == 88.0
    _, other = written(tmp_path, data, lines, system="Be good.")
    assert any("Be good." in d for x in other["compared_with"] for d in x["differs"])
    _, partial = written(tmp_path, data, lines, limit=len(lines))
    assert partial["partial"] and not partial["compared_with"]
    unknown = dataclasses.replace(data, about=data.about | {"known": ""})
    _, out = written(tmp_path, unknown, lines)
    assert not out["compared_with"]


def test_many_unparsed_answers_are_a_warning(tmp_path):
    data = made()
    lines = [{"answer": "I see a dog", "truncated": True} for _ in data.questions]
    text, out = written(tmp_path, data, lines)
    assert out["counts"]["unparsed"] == out["counts"]["truncated"] == len(lines)
    assert "I see a dog" in out["warnings"][0] and "WARNING" in text


def test_stored_answers_are_scored_by_a_command_without_a_model(tmp_path, capsys, monkeypatch):
    rows = [{"question_id": n, "image": "1.png", "text": "?", "label": "yes"} for n in range(3)]
    path, answers = tmp_path / "coco_pope_random.json", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    (tmp_path / "1.png").write_bytes(png(1))
    answers.write_text(
        "".join(json.dumps({"id": f"random/{n}", "answer": "yes"}) + "\n" for n in range(3))
    )
    monkeypatch.setattr(pipeline, "load", None)
    out = tmp_path / "out"
    args = ["pope", "--data", str(path), "--answers", str(answers), "--out", str(out)]
    benchmark.main(args)
    assert "f1_random" in capsys.readouterr().out
    said = json.loads((out / report.REPORT).read_text())
    assert said["scores"]["f1_random"]["value"] == 100 and not said["partial"]
    benchmark.main([*args, "--limit", "2"])
    assert json.loads((out / report.REPORT).read_text())["partial"]


def test_files_for_external_scorers(tmp_path):
    questions = [read.Question("7", "?", ()), read.Question("8", "?", ())]
    file = report.submission("vqav2-testdev", questions, ["a", "b"], tmp_path)
    assert file and json.loads(file.read_text()) == [
        {"question_id": 7, "answer": "a"},
        {"question_id": 8, "answer": "b"},
    ]
    file = report.submission("mmvet", [read.Question("v1_0", "?", ())], ["x"], tmp_path)
    assert file and json.loads(file.read_text()) == {"v1_0": "x"}
    assert report.submission("pope", questions, ["a", "b"], tmp_path) is None


@pytest.mark.slow
def test_the_command_resumes_and_scores(tmp_path, golden_folder, capsys):
    rows = [
        {"question_id": n, "image": "1.png", "text": f"Is it {n}?", "label": "yes"} for n in (1, 2)
    ]
    path, out = tmp_path / "coco_pope_random.json", tmp_path / "out"
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    (tmp_path / "1.png").write_bytes(png(1))
    command = ["pope", "--model", str(golden_folder), "--data", str(path), "--out", str(out)]
    command += ["--max-new-tokens", "4", "--batch", "2"]
    benchmark.main(command)
    first = capsys.readouterr()
    assert "f1_random" in first.out and "0 of 2" not in first.err
    benchmark.main(command)
    second = capsys.readouterr()
    assert first.out == second.out and "2 of 2 questions" in second.err
    with pytest.raises(ConfigError, match="max_new_tokens"):
        benchmark.main([*command, "--max-new-tokens", "5"])
    report_file = json.loads((out / report.REPORT).read_text())
    assert report_file["settings"]["model"]["checksums.json"]
    assert report_file["counts"]["asked"] == 2


def test_a_run_of_other_data_is_not_scored(tmp_path):
    data = made()
    plan.Manifest(tmp_path / answer.MANIFEST, settings(data) | {"benchmark": "gqa"})
    path = tmp_path / "coco_pope_random.json"
    path.write_text(json.dumps({"question_id": 1, "image": "1.png", "text": "?", "label": "no"}))
    (tmp_path / "1.png").write_bytes(png(1))
    with pytest.raises(ConfigError, match="--data"):
        benchmark.main(["pope", "--data", str(path), "--stage", "score", "--out", str(tmp_path)])
