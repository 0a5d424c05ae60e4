"""Benchmarks for generation: prompts, the runner, and the folders that official scorers read."""

import io
import json
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from janusflow_jax import pipeline
from janusflow_jax.config.errors import ConfigError, DataError, DivergedError, JanusFlowError
from janusflow_jax.eval.benchmarks import generate, plan, prompts as prompts_lib, registry
from janusflow_jax.eval.benchmarks.prompts import Prompt


class Painter(pipeline.Pipeline):
    """A pipeline whose image tells its prompt and its seed. It records the calls."""

    def __init__(self, side=4, bad_seeds=()):
        self.side, self.bad, self.calls = side, bad_seeds, []

    def prompt_ids(self, texts):
        return [[0] * len(text) for text in texts]

    def generate(self, texts, *, guidance_scale, num_steps, seed, output, **solver):
        assert output == "numpy"
        self.calls.append((list(texts), list(seed)))
        images = [self.image(text, s) for text, s in zip(texts, seed, strict=True)]
        if any(s in self.bad for s in seed):
            shown = [None if s in self.bad else x for x, s in zip(images, seed, strict=True)]
            raise DivergedError("non-finite", shown)
        return np.stack(images)

    def image(self, text, seed):
        out = np.full((self.side, self.side, 3), seed % 256, np.uint8)
        out[..., 0] = sum(text.encode()) % 256
        return out


def some_prompts(count):
    """Prompts of two buckets of lengths."""
    texts = ["a dog" + " and a cat" * (5 * (n % 2)) + f" {n}" for n in range(count)]
    return [
        Prompt(f"{n:05d}", text, n, {"prompt": text, "tag": "colors", "category": "art"})
        for n, text in enumerate(texts)
    ]


def settings_for(name, prompts, batch=4, **changes):
    benchmark = registry.get(name)
    count = len(prompts) * benchmark.images_per_prompt
    values = {"guidance_scale": 2.0, "num_steps": 2, "order": 1, "shift": 1.0, "seed": 100}
    values |= {"guidance_interval": [0.0, 1.0], "batch": batch, "images": count}
    return {**values, **changes}


def run(out, name="geneval", count=5, painter=None, shard=(0, 1), extractor=None, **changes):
    """All batches; the painter."""
    prompts, painter = some_prompts(count), painter or Painter()
    settings = settings_for(name, prompts, **changes)
    args = (registry.get(name), prompts, painter, epath.Path(out), settings, shard, extractor)
    *_, (done, total) = generate.run(*args)
    assert done == total
    return painter


def means(images):
    """Features: the mean color, in which green is the seed."""
    return {"mean": images.mean((1, 2), np.float32)}


def never(images):
    raise AssertionError("computed again")


def contents(out):
    return {str(x.relative_to(out)): x.read_bytes() for x in out.rglob("*") if x.is_file()}


# --- prompts


def geneval_line(text, tag="colors"):
    return json.dumps({"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": text})


def test_geneval_prompts(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(geneval_line(t) + "\n" for t in ("a dog", "two dogs")))
    rows, about = prompts_lib.read("geneval", tmp_path)
    assert [(p.id, p.text, p.number) for p in rows] == [
        ("00000", "a dog", 0),
        ("00001", "two dogs", 1),
    ]
    assert rows[0].record["include"] and about["rows"] == 2 and len(about["sha256"]) == 64
    limited, same = prompts_lib.read("geneval", file, limit=1)
    assert limited == rows[:1] and same == about


def test_dpg_prompts(tmp_path):
    for name in ("b10", "b9", "a"):
        (tmp_path / f"{name}.txt").write_text(f" text of {name}\n")
    rows, about = prompts_lib.read("dpg", tmp_path)
    assert [(p.id, p.text) for p in rows] == [(n, f"text of {n}") for n in ("a", "b10", "b9")]
    (tmp_path / "a.txt").write_text("other")
    assert prompts_lib.read("dpg", tmp_path)[1]["sha256"] != about["sha256"]


def test_mjhq_selection_is_the_same_of_each_category(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_lib, "_PER_CATEGORY", 3)
    data = {f"id{n}": {"category": "ab"[n % 2], "prompt": f"p {n}"} for n in range(20)}
    (tmp_path / "meta_data.json").write_text(json.dumps(data))
    rows, about = prompts_lib.read("mjhq-fid10k", tmp_path)
    assert [p.record["category"] for p in rows].count("a") == 3 == len(rows) // 2
    whole, _ = prompts_lib.read("mjhq-fid30k", tmp_path)
    assert len(whole) == 20 and {*map(str, rows)} <= {*map(str, whole)} and about["rows"] == 20


def test_wise_prompts(tmp_path):
    for name, ids in (("b", (1, 2)), ("a", (10, 3))):
        rows = [{"prompt_id": i, "Prompt": f"p {i}", "Subcategory": name} for i in ids]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    assert [p.id for p in prompts_lib.read("wise", tmp_path)[0]] == ["1", "2", "3", "10"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("geneval", geneval_line("a") + "\n{", "line 2"),
        ("geneval", geneval_line(" "), "row 0"),
        ("geneval", "", "got none"),
        ("geneval", '{"prompt": "a"}', "tag"),
        ("geneval2", '{"prompt": "a"}\n{"prompt": "a"}', "each prompt once"),
        ("mjhq-fid30k", '{"../x": {"category": "art", "prompt": "a"}}', "id of letters"),
        ("mjhq-fid30k", '{"x": {"category": "..", "prompt": "a"}}', "category"),
        ("mjhq-fid30k", "[]", "dict"),
        ("wise", json.dumps([{"prompt_id": 1, "Prompt": "a"}] * 2), "'1' 2 times"),
    ],
)
def test_wrong_data_are_named(tmp_path, name, text, message):
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        prompts_lib.read(name, file)


def test_data_that_are_not_there(tmp_path):
    for name in ("geneval", "dpg", "wise"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path))):
            prompts_lib.read(name, tmp_path / "none")
    with pytest.raises(DataError, match="txt"):
        prompts_lib.read("dpg", tmp_path)


# --- the runner


def test_images_are_those_of_their_prompts_and_seeds(tmp_path):
    painter = run(tmp_path)
    settings, images = generate.read(epath.Path(tmp_path))
    assert settings["seed"] == 100 and len(images) == 20
    for x in images:
        assert x["seed"] == 100 + 4 * int(x["id"]) + x["image"]
        image = np.asarray(Image.open(tmp_path / "images" / x["file"]))
        np.testing.assert_array_equal(image, painter.image(x["prompt"], x["seed"]))
    for texts, _ in painter.calls:
        assert len(texts) == 4 and len({len(t) > 32 for t in texts}) == 1


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_writes_the_same_files(tmp_path, count):
    one = run(tmp_path / "one")
    many = [run(tmp_path / "many", shard=(n, count)) for n in reversed(range(count))]
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    calls = [call for painter in many for call in painter.calls]
    assert sorted(calls) == sorted(one.calls) and all(painter.calls for painter in many)


def test_an_interrupted_run_resumes(tmp_path):
    whole, broken = run(tmp_path / "whole"), Painter()
    prompts, out = some_prompts(5), epath.Path(tmp_path / "broken")
    steps = generate.run(
        registry.get("geneval"),
        prompts,
        broken,
        out,
        settings_for("geneval", prompts),
    )
    for _ in range(3):
        next(steps)
    with pytest.raises(DataError, match="expected 20 images; got 8"):
        generate.read(epath.Path(tmp_path / "broken"))
    rest = run(tmp_path / "broken")
    assert broken.calls + rest.calls == whole.calls
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    assert not run(tmp_path / "broken").calls


def test_a_missing_or_changed_image_is_named_and_generated_again(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    file = tmp_path / "images" / "00003" / "samples" / "00001.png"
    file.write_bytes(b"other")
    with pytest.raises(DataError, match="00003/samples/00001.png.*got another"):
        generate.read(epath.Path(tmp_path))
    file.unlink()
    with pytest.raises(DataError, match="00003/samples/00001.png.*missing"):
        generate.read(epath.Path(tmp_path))
    assert len(run(tmp_path).calls) == 1
    assert contents(tmp_path) == before


def test_other_settings_change_nothing(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="guidance_scale: 2.0 then, 5.0 now"):
        run(tmp_path, guidance_scale=5.0)
    assert contents(tmp_path) == before


def test_non_finite_images_are_recorded_and_not_written(tmp_path):
    run(tmp_path, painter=Painter(bad_seeds=[105]), extractor=generate.Extractor("a", means))
    _, images = generate.read(epath.Path(tmp_path))
    assert [x["id"] for x in images if x["file"] is None] == ["00001"]
    assert not (tmp_path / "images/00001/samples/00001.png").exists()
    names = (tmp_path / "images/00001/samples").iterdir()
    assert sorted(x.name for x in names) == ["00000.png", "00002.png", "00003.png"]
    stored = generate.Extractor("a", never)
    assert generate.read_features(epath.Path(tmp_path), stored, 4)["mean"].shape == (19, 3)


@pytest.mark.parametrize(("name", "size"), [("geneval", 3), ("geneval", 32), ("dpg", 2)])
def test_wrong_batch_sizes_are_refused(name, size):
    with pytest.raises(ConfigError, match="--batch"):
        generate.check_batch_size(registry.get(name), size)


def test_a_prompt_that_is_too_long_writes_nothing(tmp_path):
    class Short(Painter):
        def prompt_ids(self, texts):
            raise JanusFlowError("too long")

    with pytest.raises(JanusFlowError, match="too long"):
        run(tmp_path, painter=Short())
    assert not contents(tmp_path)


# --- features


def test_features_are_in_the_order_of_the_images_stored_or_not(tmp_path):
    early, late = (epath.Path(tmp_path / n) for n in ("early", "late"))
    run(early, extractor=generate.Extractor("a", means))
    run(late)
    stored = generate.read_features(early, generate.Extractor("a", never), 4)["mean"]
    _, images = generate.read(early)
    assert stored[:, 1].tolist() == [x["seed"] for x in images]
    for compute in (means, never):
        again = generate.read_features(late, generate.Extractor("a", compute), 4)["mean"]
        np.testing.assert_array_equal(stored, again)


def test_a_batch_without_its_features_has_no_mark(tmp_path):
    with pytest.raises(AssertionError, match="again"):
        run(tmp_path, extractor=generate.Extractor("a", never))
    assert plan.read_marks(tmp_path / "manifest") == {}
    assert len(run(tmp_path).calls) == 5


def test_features_of_other_networks_are_not_taken(tmp_path):
    out = epath.Path(tmp_path)
    run(out, extractor=generate.Extractor("a", means))
    other = generate.Extractor("b", lambda images: {"mean": -means(images)["mean"]})
    assert (generate.read_features(out, other, 4)["mean"][:, 1] < 0).all()
    assert (generate.read_features(out, generate.Extractor("a", never), 4)["mean"][:, 1] > 0).all()


# --- layouts


def test_the_layout_is_the_one_that_the_official_geneval_walks(tmp_path):
    """Folders of digits with metadata.jsonl, one JSON object, and samples named by digits."""
    run(tmp_path)
    folders = sorted((tmp_path / "images").iterdir())
    assert [x.name for x in folders] == [f"{n:05d}" for n in range(5)]
    for folder, prompt in zip(folders, some_prompts(5), strict=True):
        assert folder.name.isdigit()
        assert json.loads((folder / "metadata.jsonl").read_text()) == prompt.record
        names = sorted(x.name for x in (folder / "samples").iterdir())
        assert len(names) == 4 and all(re.fullmatch(r"\d+\.png", n) for n in names)


def test_grids_are_cut_into_the_images_in_the_official_order(tmp_path):
    painter = run(tmp_path, name="dpg")
    files = sorted((tmp_path / "images").iterdir())
    assert [x.name for x in files] == [f"{n:05d}.png" for n in range(5)]
    side = painter.side
    for n, (file, prompt) in enumerate(zip(files, some_prompts(5), strict=True)):
        grid = Image.open(file)
        assert grid.size == (2 * side, 2 * side)
        for j, (x, y) in enumerate([(0, 0), (side, 0), (0, side), (side, side)]):
            tile = np.asarray(grid.crop((x, y, x + side, y + side)))
            np.testing.assert_array_equal(tile, painter.image(prompt.text, 100 + 4 * n + j))


def test_a_grid_with_a_non_finite_image_is_missing(tmp_path):
    run(tmp_path, name="dpg", painter=Painter(bad_seeds=[101]))
    _, images = generate.read(epath.Path(tmp_path))
    assert [x["id"] for x in images if x["file"] is None] == ["00000"] * 4
    assert not (tmp_path / "images" / "00000.png").exists()


def test_layouts_with_one_image_a_prompt(tmp_path):
    run(tmp_path / "mjhq", name="mjhq-fid30k")
    assert (tmp_path / "mjhq/images/art/00004.png").exists()
    run(tmp_path / "wise", name="wise")
    assert Image.open(io.BytesIO((tmp_path / "wise/images/00000.png").read_bytes())).format == "PNG"
    record = plan.read_marks(tmp_path / "wise" / "manifest")[0]
    assert record["images"][0]["file"] == "00000.png"
