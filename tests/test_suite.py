"""The suite `emoji` and its command, with a model that is always right."""

import dataclasses
import json

import pytest
from helpers.drawings import PerfectModel, draw, draw_all, real_drawings

from janusflow_jax import config, evaluate
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.openmoji import drawings, judge as judge_lib, prompts, scores, suite


class Idle(PerfectModel):
    def generate(self, *_, **__):
        raise AssertionError("generated images that cannot be scored")


def score_generation(model, refs, judge, folder, count=8):
    return suite.score_generation(
        model,
        refs,
        judge,
        count=count,
        guidance_scale=2.0,
        solver={"num_steps": 2},
        seed=0,
        sheet_file=folder / "sheet.png",
    )


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A command line of `evaluate` for the perfect model; 16 pairs of its sheet are trained."""
    images, labels = draw_all()
    sheet = tuple((x.color, x.name, i % 3 < 2) for i, x in enumerate(labels[:24]))
    monkeypatch.setattr(prompts, "SHEET", sheet)
    monkeypatch.setattr(prompts, "PROMPTS", tuple(prompts.caption(c, n) for c, n, _ in sheet))
    refs = suite.References(scores.make_gallery(images, labels), *real_drawings(labels))
    monkeypatch.setattr(suite, "references", lambda path: refs)
    monkeypatch.setattr(evaluate.pipeline, "load", lambda path, **_: PerfectModel())

    def caption_source(model, source, count):
        out = []
        for i, x in enumerate(labels[:count]):
            captions = drawings.captions(x.color, x.name)
            record = {"id": str(i), "class": x.name, "colour": x.color, "captions": captions}
            out.append({**record, "answer": captions[0], "image": b""})
        return out

    monkeypatch.setattr(suite.previews, "caption_source", caption_source)
    out, data, model = (tmp_path / x for x in ("eval.json", "data", "model"))
    for folder in (data, model):
        folder.mkdir()
    (model / "model.json").write_text(json.dumps({"config": {"name": "emoji"}}))
    options = f"--model {model} --data {data} --out {out} --prompts 12 --captions 30"
    return [*options.split(), "--judge", ""]


def test_every_claim_holds_for_a_perfect_model(command, tmp_path):
    out = tmp_path / "eval.json"
    evaluate.main(command)
    report = json.loads(out.read_text())
    printed = suite.table(report)
    assert printed.count("  better") == 2 * 3 + 3 * 10 and "NOT better" not in printed
    assert report["settings"]["suite"] == "emoji"
    assert report["sheet"]["hue"]["right"] == 24 and len(report["trained_pairs"]["images"]) == 12
    generated = {x["prompt"] for x in report["trained_pairs"]["images"]}
    assert len(generated) == 12 and generated.isdisjoint(prompts.PROMPTS)
    assert sum(x["trained"] for x in report["sheet"]["images"]) == 16
    assert len(report["model"]["model.json"]) == len(report["data"]["files_sha256"]) == 64
    assert out.with_suffix(".png").exists()
    evaluate.main(command)
    assert {**json.loads(out.read_text()), "seconds": 0} == {**report, "seconds": 0}
    evaluate.main([*command, "--prompts", "0"])
    assert json.loads(out.read_text()).keys() == report.keys() - {"sheet", "trained_pairs"}
    evaluate.main([*command, "--captions", "0"])
    assert json.loads(out.read_text()).keys() == report.keys() - {"captions"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prompts 1", "2 or more"),
        ("--prompts 0 --captions 0", "nothing to score"),
        ("--suite losses", "expected --config"),
        ("--out eval.png", "sheet"),
    ],
)
def test_options_that_cannot_work_are_refused(command, options, message):
    with pytest.raises(JanusFlowError, match=message):
        evaluate.main([*command, *options.split()])


def test_only_models_of_the_quick_start_have_a_default_suite(command, tmp_path):
    (tmp_path / "model" / "model.json").write_text(json.dumps({"config": {"name": "1p3b"}}))
    with pytest.raises(JanusFlowError, match=r"--suite: .*'1p3b'"):  # without loading the model
        evaluate.main(command)
    evaluate.main([*command, "--suite", "emoji"])
    run = {"config": {"model": {"name": "emoji"}}}
    (tmp_path / "model" / "model.json").unlink()
    (tmp_path / "model" / "run.json").write_text(json.dumps(run))
    evaluate.main(command)


def test_a_model_that_cannot_caption_stops_before_it_generates(command, monkeypatch):
    def caption_source(model, source, count):
        raise CheckpointError("lacks und_aligner")

    monkeypatch.setattr(suite.previews, "caption_source", caption_source)
    monkeypatch.setattr(evaluate.pipeline, "load", lambda path, **_: Idle())
    with pytest.raises(CheckpointError, match="und_aligner"):
        evaluate.main(command)


def test_generation_is_scored_with_the_judge_and_the_same_twice(referee, shown, tmp_path):
    one, two = (score_generation(PerfectModel(), shown, referee, tmp_path) for _ in "ab")
    assert json.dumps(one) == json.dumps(two)
    assert one["sheet"]["alignment"]["of"] == 24 and one["trained_pairs"]["frechet"]["of"] == 8
    assert suite.table(one).count("better") == 2 * 5
    assert "trained_pairs frechet: of 8, reference 16, painted" in suite.table(one)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_pairs_have_no_frechet_distance(count, shown, referee, tmp_path):
    part = score_generation(PerfectModel(), shown, referee, tmp_path, count)["trained_pairs"]
    assert part["alignment"]["of"] == len(part["images"]) == count
    assert ("frechet" in part) == (count >= judge_lib.MIN_IMAGES)
    json.dumps(part, allow_nan=False)


def test_nothing_is_generated_that_cannot_be_scored(shown, referee, tmp_path):
    def refused(message, model=None, **changes):
        with pytest.raises(JanusFlowError, match=message):
            refs = dataclasses.replace(shown, **changes)
            score_generation(model or Idle(), refs, referee, tmp_path)

    refused("two or more", unseen=dict(list(shown.unseen.items())[:25]))
    first, *_ = shown.unseen
    one = scores.make_gallery([draw(first.name, first.color)], [first])
    refused("blue flat shape 3", gallery=one)
    large = Idle()
    large.cfg = config.model_config("test", 128)
    refused("judge: expected images of 64 x 64; got 128", model=large)
