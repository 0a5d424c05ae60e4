"""The small GenEval of the quick start: the command, its detector, and the command again."""

import json

import numpy as np
import pytest
from etils import epath
from helpers import drawings
from PIL import Image

from janusflow_jax import benchmark
from janusflow_jax.config.errors import DataError
from janusflow_jax.openmoji import geneval, judge as judge_lib, prompts


class PerfectModel(drawings.PerfectModel):
    """Right, but for the color of thin shapes."""

    dtype = "float32"

    def prompt_ids(self, texts):
        return [[0] * len(text) for text in texts]

    def generate(self, texts, **options):
        wrong = [t.replace("red", "blue") if "thin" in t else t for t in texts]
        return super().generate(wrong, **options)


class Judge(judge_lib.LoadedJudge):
    """Knows every drawing: features are one-hot over labels, of images by the nearest drawing."""

    def embed_images(self, images):
        known = [drawings.draw(x.name, x.color, turn=4).astype(float) for x in self.cfg.labels]
        errors = [[np.abs(x - y).mean() for y in known] for x in images]
        return np.eye(len(known))[np.argmin(errors, axis=1)]

    def embed_texts(self, labels):
        return np.eye(len(self.cfg.labels))[[self.cfg.labels.index(x) for x in labels]]


@pytest.fixture
def judge(referee):
    return Judge(referee.cfg, referee.params, referee.about, referee.sha256)


def test_the_whole_way(tmp_path, monkeypatch, judge):
    sheet = tuple(("red", name, "thin" not in name) for name in list(drawings.SHAPES)[:6])
    monkeypatch.setattr(prompts, "SHEET", sheet)
    monkeypatch.setattr(benchmark.cli, "load", lambda args: PerfectModel())
    monkeypatch.setattr(benchmark.provenance, "resolve", lambda path: epath.Path(path))
    monkeypatch.setattr(benchmark.provenance, "of", lambda *_: {"model.json": "0"})
    data, out, results = (tmp_path / x for x in ("data.jsonl", "run", "results.jsonl"))
    data.write_text("".join(json.dumps(x) + "\n" for x in geneval.metadata()))
    benchmark.main(f"geneval --model m --data {data} --out {out} --batch 4".split())
    lines = list(geneval.detect(judge, epath.Path(out) / "images"))
    results.write_text("".join(json.dumps(x) + "\n" for x in lines))
    benchmark.main(f"geneval --out {out} --results {results}".split())
    report = json.loads((out / "report.json").read_text())
    scores = {name: x["value"] for name, x in report["scores"].items()}
    assert (scores["trained_pair"], scores["new_pair"], scores["overall"]) == (100, 0, 50)
    assert {x["reason"] for x in lines} == {"", "color"} and len(lines) == 24
    assert "GenEval" not in scores and not report["compared_with"]
    assert not any("verdicts" in x for x in report["warnings"])


def test_the_wrong_class_and_no_color_are_wrong(tmp_path, judge):
    record = {
        "tag": "new_pair",
        "include": [{"class": "round shape 3", "count": 1, "color": "red"}],
        "prompt": "a red round shape 3",
    }
    folder = epath.Path(tmp_path) / "00000"
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(json.dumps(record))
    for j, image in enumerate([drawings.draw("flat shape 4", "red"), np.full((64, 64, 3), 90)]):
        drawn = Image.fromarray(np.asarray(image, np.uint8))
        drawn.save(str(folder / "samples" / f"{j:05d}.png"))
    reasons = [x["reason"] for x in geneval.detect(judge, epath.Path(tmp_path))]
    assert reasons[0] == "count" and reasons[1] in ("count", "color")
    assert geneval.color_of(np.full((4, 4, 3), 90, np.uint8)) == ""


def test_a_folder_without_images_is_named(tmp_path, judge):
    with pytest.raises(DataError, match="images of a run"):
        list(geneval.detect(judge, epath.Path(tmp_path)))
