"""Reports of generated images, from the files that the external scorers write."""

import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from janusflow_jax import benchmark as command
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.eval import clip, fid, inception
from janusflow_jax.eval.benchmarks import generate, image_scores, plan, registry

SIDE = 8


def write_run(out, name, ids, batch=4, rows=None, bad=()):
    """A complete run of noise, as the runner leaves it; its settings and images."""
    benchmark = registry.get(name)
    per_prompt = benchmark.images_per_prompt
    settings = {
        "benchmark": name,
        "protocol": "raw",
        "data": {"sha256": "0" * 64, "rows": rows or len(ids)},
        "images": len(ids) * per_prompt,
        "images_per_prompt": per_prompt,
        "image_size": SIDE,
        "batch": batch,
    }
    manifest = plan.Manifest(out / "manifest", settings)
    generator = np.random.default_rng(0)
    for index, key in enumerate(ids):
        images, sums = [], {}
        for j in range(per_prompt):
            file = f"{key}/samples/{j:05d}.png" if name == "geneval" else f"{key}.png"
            missing = (key, j) in bad
            images.append({"id": key.split("/")[-1], "image": j, "prompt": f"prompt {key}"})
            images[-1] |= {"seed": j, "file": None if missing else file}
            path = out / "images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(data, "PNG")
            if not missing:
                path.write_bytes(data.getvalue())
                sums[file] = hashlib.sha256(data.getvalue()).hexdigest()
        manifest.commit(index, {"images": images, "files": sums})
    return generate.read(out)


@pytest.fixture
def out(tmp_path):
    return epath.Path(tmp_path / "run")


# --- GenEval


def geneval_lines(images, right):
    """The official script's lines, on its own machine; `right(id, image)`."""
    lines = []
    for x in images:
        metadata = {"tag": "colors" if int(x["id"]) % 3 else "counting", "include": []}
        lines.append(
            {
                "filename": f"/elsewhere/images/{x['file']}",
                "tag": metadata["tag"],
                "prompt": x["prompt"],
                "correct": right(x["id"], x["image"]),
                "metadata": json.dumps(metadata | {"prompt": x["prompt"]}),
            }
        )
    return lines


def write_lines(file, lines):
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return file


def write_check(folder, name, passed=True):
    (folder / "self_check.json").write_text(json.dumps({"benchmark": name, "passed": passed}))


def test_geneval_is_the_mean_of_its_tasks(out, tmp_path, monkeypatch):
    ids = [f"{n:05d}" for n in range(6)]
    settings, images = write_run(out, "geneval", ids)
    lines = geneval_lines(images, lambda key, j: int(key) % 3 == 0 or j == 0)
    file = write_lines(tmp_path / "results.jsonl", lines[::-1])
    result = image_scores.geneval(registry.get("geneval"), settings, images, file)
    scores = {name: value.value for name, value in result.scores.items()}
    assert scores.pop("overall") == pytest.approx((100 + 25) / 2)  # not 50, the mean of images
    assert scores == {"colors": 25, "counting": 100, "images": 50, "prompts": 100}
    assert "GenEval" not in result.scores and len(result.warnings) == 3
    assert result.counts == {"asked": 24, "expected": 2212, "missing": 0}


@pytest.fixture
def small_geneval(monkeypatch):
    """GenEval as if it had 6 prompts, those of `write_run`."""
    whole = registry.get("geneval")
    data = registry.DataFile("evaluation_metadata.jsonl", 6, "sha256:" + "0" * 64)
    changes = {"files": (data,), "prompts": 6}
    small = dataclasses.replace(whole, **changes)
    monkeypatch.setitem(registry.BENCHMARKS, "geneval", small)
    return small


def test_only_a_whole_and_checked_run_is_called_geneval(out, tmp_path, small_geneval):
    ids = [f"{n:05d}" for n in range(6)]
    settings, images = write_run(out, "geneval", ids)
    file = write_lines(tmp_path / "results.jsonl", geneval_lines(images, lambda *_: True))

    def first(settings=settings, images=images):
        result = image_scores.geneval(small_geneval, settings, images, file)
        return next(iter(result.scores)), result.warnings

    assert first()[0] == "overall"
    write_check(tmp_path, "geneval", passed=False)
    assert first()[0] == "overall"
    write_check(tmp_path, "dpg")
    assert first()[0] == "overall"
    write_check(tmp_path, "geneval")
    assert first() == ("GenEval", [])
    other = {**settings, "data": {"sha256": "1" * 64, "rows": 6}}
    assert first(settings=other)[0] == "overall"


def test_a_missing_image_takes_the_name_away(out, tmp_path, small_geneval):
    ids = [f"{n:05d}" for n in range(6)]
    settings, images = write_run(out, "geneval", ids, bad=[("00002", 1)])
    there = [x for x in images if x["file"]]
    file = write_lines(tmp_path / "results.jsonl", geneval_lines(there, lambda *_: True))
    write_check(tmp_path, "geneval")
    result = image_scores.geneval(small_geneval, settings, images, file)
    assert next(iter(result.scores)) == "overall" and "1 images" in result.warnings[0]
    assert result.counts["missing"] == 1


def test_results_of_another_run_are_refused(out, tmp_path):
    settings, images = write_run(out, "geneval", ["00000", "00001"])
    lines = geneval_lines(images, lambda *_: True)
    moved = [{**lines[0], "filename": "/x/images/00009/samples/00000.png"}, *lines[1:]]
    other = [{**lines[0], "prompt": "another"}, *lines[1:]]
    wrong = {
        "00001/samples/00003.png twice": [*lines, lines[-1]],
        "without 00000/samples/00000.png": lines[1:],
        "00009/samples/00000.png": moved,
        "another": other,
        "tag": [{"filename": "x"}],
    }
    for message, rows in wrong.items():
        file = write_lines(tmp_path / "results.jsonl", rows)
        with pytest.raises(DataError, match=message):
            image_scores.geneval(registry.get("geneval"), settings, images, file)
    with pytest.raises(DataError, match="there is no"):
        image_scores.geneval(registry.get("geneval"), settings, images, tmp_path / "none")


def test_verdicts_that_contradict_their_boxes_are_a_warning(out, tmp_path):
    settings, images = write_run(out, "geneval", ["00000"])
    lines = geneval_lines(images, lambda *_: True)
    clause = {"include": [{"class": "dog", "count": 1}]}
    for line in lines:
        line["metadata"] = json.dumps({"tag": line["tag"], **clause, "prompt": line["prompt"]})
        line["details"] = json.dumps({"dog": [[0, 0, 4, 4, 0.99]]})
    lines[0]["details"] = "{}"
    file = write_lines(tmp_path / "results.jsonl", lines)
    result = image_scores.geneval(registry.get("geneval"), settings, images, file)
    assert any(x.startswith("1 verdicts") for x in result.warnings)


# --- DPG-Bench

QUESTIONS = """item_id,text,keywords,proposition_id,dependency,category_broad,\
category_detailed,tuple,question_natural_language
a,t,k,1,0,entity,whole,entity - whole (dog),Is there a dog?
a,t,k,2,1,attribute,color,"attribute - color (dog, red)",Is the dog red?
b,t,k,1,0,entity,whole,entity - whole (cat),"Is there a cat, or two?"
c,t,k,1,0,entity,whole,entity - whole (fox),Is there a fox?
"""


def detail(side, answers):
    crops = [(0, 0), (side, 0), (0, side), (side, side)]
    questions = {
        "a": ["Is there a dog?", "Is the dog red?"],
        "b": ["Is there a cat, or two?"],
    }
    return "".join(
        f"/x/{key}.png, ({x}, {y}, {x + side}, {y + side}), {q}, {answers(key, n, j)}\n"
        for key, own in questions.items()
        for j, (x, y) in enumerate(crops)
        for n, q in enumerate(own)
    )


@pytest.fixture
def dpg_files(out, tmp_path):
    settings, images = write_run(out, "dpg", ["a", "b"])
    (tmp_path / "dpg_bench.csv").write_text(QUESTIONS)

    def score(text):
        (tmp_path / "x_detail.txt").write_text(text)
        return image_scores.dpg(
            registry.get("dpg"),
            settings,
            images,
            tmp_path / "x_detail.txt",
            tmp_path / "dpg_bench.csv",
        )

    return score


def test_dpg_counts_dependencies(dpg_files):
    # no dog in image 0, where the dog is said to be red; no cat in images 1 to 3
    no = {("a", 0, 0), ("b", 0, 1), ("b", 0, 2), ("b", 0, 3)}
    result = dpg_files(detail(SIDE, lambda *key: "no" if key in no else "yes"))
    assert result.scores["overall"].value == pytest.approx((75 + 25) / 2)
    assert result.categories["attribute"].value == pytest.approx(75)
    assert result.counts["questions"] == 3 and "DPG-Bench" not in result.scores


def test_dpg_with_another_tile_size_or_missing_answers_is_refused(dpg_files):
    yes = detail(SIDE, lambda *_: "yes")
    with pytest.raises(DataError, match="--resolution 8"):
        dpg_files(detail(2 * SIDE, lambda *_: "yes"))
    with pytest.raises(DataError, match="b, image 3"):
        dpg_files(yes.rsplit("\n", 2)[0] + "\n")


# --- MJHQ


@pytest.fixture
def networks(monkeypatch):
    """Networks whose features are colors; the official file of Inception and another one."""
    monkeypatch.setattr(
        fid, "_embed", lambda net, images, name: np.stack([x.mean((0, 1)) for x in images])
    )
    monkeypatch.setattr(clip, "score", lambda *_: {"clip_score": 25.0, "of": 12})
    return [inception.LoadedInception(None, "ab" * 32, official) for official in (True, False)]


def test_fid_of_the_references_of_the_same_prompts(out, tmp_path, networks):
    ids = [f"{'art' if n % 2 else 'food'}/{n}" for n in range(12)]
    settings, images = write_run(out, "mjhq-fid10k", ids, rows=30_000)
    folder = tmp_path / "mjhq30k_imgs"
    for n, key in enumerate([*ids, "art/99"]):
        file = folder / f"{key}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * n, n * n, 255 - n)).save(file)
    benchmark = registry.get("mjhq-fid10k")
    official, other = networks
    result = image_scores.mjhq(benchmark, settings, images, out, folder, official, None)
    names = [f"fid_{x}{y}" for y in ("", "_of_all_references") for x in fid.VARIANTS]
    assert list(result.scores) == names
    assert result.scores["fid_janus"] > 0
    assert result.scorer["reference_count_of_all_references"] == 13
    assert result.warnings == ["12 images; the whole benchmark has 10000"]
    result = image_scores.mjhq(benchmark, settings, images, out, folder, other, None)
    assert list(result.scores)[0] == "other_fid_janus" and len(result.warnings) == 2
    kept = [*(out.parent / image_scores.REFERENCES).iterdir()]
    assert len(kept) == 2  # the same prompts, and all references
    (folder / "art" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"art/1\.jpg"):
        image_scores.mjhq(benchmark, settings, images, out, folder, official, None)
    with pytest.raises(ConfigError, match="--inception"):
        image_scores.mjhq(benchmark, settings, images, out, folder, None, None)


# --- the command


def run_command(text, *paths):
    command.main([*text.split(), *map(str, paths)])


def test_the_command_scores_a_stored_run(out, tmp_path, capsys):
    _, images = write_run(out, "geneval", ["00000", "00001"])
    run_command("geneval --stage score --out", out)
    assert str(out / "images") in capsys.readouterr().out
    file = write_lines(tmp_path / "results.jsonl", geneval_lines(images, lambda *_: True))
    run_command("geneval --out", out, "--results", file)
    report = json.loads((out / "report.json").read_text())
    assert report["partial"] and report["scores"]["overall"]["value"] == 100
    assert "PARTIAL" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="got geneval"):
        run_command("dpg --stage score --out", out)


def test_geneval2_gets_its_file_of_paths(out, capsys):
    write_run(out, "geneval2", ["00000", "00001"])
    run_command("geneval2 --stage score --out", out)
    paths = json.loads((out / "image_filepath_data.json").read_text())
    assert paths["prompt 00001"] == str(out / "images" / "00001.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("geneval", "--out"),
        ("genevil --out x", "genevil"),
        ("geneval --out x", "--model"),
        ("geneval --out x --model m --data d --batch 3", "--batch"),
        ("geneval --out x --model m --data d --protocol rewritten", "--protocol"),
        ("geneval --out x --model m --data d --shard 2/2", "there is no"),
        ("dpg --stage score --out x", "settings"),
        ("geneval --out x --answers a --pixels own", "--answers, --pixels: geneval does not read"),
        ("pope --out x --data d --order 2", "--order: pope does not read"),
    ],
)
def test_wrong_commands_are_named(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        run_command(text)
    assert not list(tmp_path.iterdir())


def test_list_names_every_benchmark(capsys):
    run_command("--list")
    text = capsys.readouterr().out
    assert all(name in text for name in registry.BENCHMARKS)
