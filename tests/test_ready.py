"""What scores need is said before painting; a distance of too few pictures is left out."""

import dataclasses
import json

import pytest
from helpers.drawings import PerfectModel, draw, draw_all, real_drawings

from janusflow_jax import config, evaluate
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.openmoji import judged, ready, scores


class _Idle(PerfectModel):
    def generate(self, *_, **__):
        raise AssertionError("painted, though the pictures cannot be scored")


@pytest.mark.parametrize("prompts", [2, 3, 4])
def test_few_pairs_have_no_distance_and_the_report_says_so(
    prompts, shown, referee, tmp_path, capsys
):
    args = evaluate.parse(["--model", "x", "--prompts", str(prompts), "--captions", "0"])
    report = evaluate.paint(PerfectModel(), args, referee, tmp_path / "sheet.png")
    part = report["trained_pairs"]
    assert part["alignment"]["of"] == len(part["pictures"]) == prompts
    said = capsys.readouterr().out
    verdicts = json.dumps(evaluate.verdicts(report), allow_nan=False)
    if prompts < judged.LEAST:
        assert "frechet" not in part and part["frechet_left_out"].endswith(f"got {prompts}")
        assert said.startswith("no Frechet distance: expected 4") and "Frechet" not in verdicts
    else:
        assert part["frechet"]["of"] == 4 and "frechet_left_out" not in part
        assert "no Frechet" not in said and "Frechet" in verdicts


def test_what_a_distance_needs(referee):
    pictures, labels = draw_all()
    real = real_drawings(labels)
    few = judged.Drawn(real.views, {x: real.unseen[x] for x in labels[:3]})
    assert judged.too_few(labels, few).endswith("with an unseen view; got 3")
    assert "beside the painted ones" in judged.too_few(labels, real)  # no other prompts
    assert judged.too_few(labels[:4], real) == ""
    with pytest.raises(ValueError, match="Frechet distance: expected 4 or more"):
        judged.frechet_distance(referee, pictures, labels, few)


def test_nothing_is_painted_that_cannot_be_scored(shown, referee, tmp_path):
    args = evaluate.parse(["--model", "x", "--prompts", "8"])

    def said(model=None, **changes):
        refs = dataclasses.replace(shown, **changes)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as error:
            patch.setattr(evaluate, "references", lambda path: refs)
            evaluate.paint(model or _Idle(), args, referee, tmp_path / "sheet.png")
        return str(error.value)

    assert "beside the sheet's; got 1" in said(trained=shown.trained[:25])
    first = shown.trained[0]
    strange = scores.Label("dragon", "pink")
    some = scores.make_gallery([draw(first.name, first.colour)], [first])
    text = said(gallery=some, trained=[*shown.trained[:24], strange, strange])
    for part in (
        "a drawing of each prompt; got none of ['blue flat shape 3'",
        f"got one in ['{first.colour}']",
        "got ['pink dragon']: give --judge ''",
    ):
        assert part in text
    large = _Idle()
    large.cfg = config.model_config("test", 128)
    assert "expected a model and data of (64, 64); got [(64, 64), (128, 128)]" in said(large)


def test_what_captions_need(monkeypatch):
    splits, model = evaluate.CAPTION_SPLITS, PerfectModel()
    monkeypatch.setattr(ready.sources, "open_source", lambda path, split: [0] * len(split))
    ready.check_captions(model, "data", splits, 200)
    model.params.pop("und_aligner")
    with pytest.raises(CheckpointError, match=r"lacks .*und_aligner"):
        ready.check_captions(model, "data", splits, 200)
    monkeypatch.setattr(ready.sources, "open_source", lambda path, split: [0])
    with pytest.raises(ValueError, match=r"two or more pictures in every split.*'train': 1"):
        ready.check_captions(PerfectModel(), "data", splits, 200)
