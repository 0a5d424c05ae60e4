"""Scores in the judge's feature space, and captions that are right in part: known answers."""

from __future__ import annotations

import difflib
import json

import numpy as np
import pytest
from helpers.drawings import PerfectModel, draw_all, real_drawings

from janusflow_jax import evaluate
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.openmoji import (
    drawings as openmoji_drawings,
    frechet,
    judge,
    judged,
    partial,
    scores as emoji,
)


def normal(n, mean, cov, seed=0):
    return np.random.default_rng(seed).multivariate_normal(mean, cov, n, method="cholesky")


# --- the distance


def test_distance_of_normals_is_the_formula():
    """For diagonal covariances: |m - n|^2 + sum (s - t)^2 of the standard deviations."""
    a = normal(200_000, [0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    b = normal(200_000, [1, 0, 2], np.diag([4.0, 4.0, 1.0]), seed=1)
    assert frechet.distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=0.01)


def test_distance_does_not_change_with_the_axes_and_the_order():
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))
    a, b = normal(50, np.zeros(4), np.eye(4)), normal(60, np.ones(4), 2 * np.eye(4), seed=1)
    want = frechet.distance(a, b)
    assert frechet.distance(b, a) == pytest.approx(want, rel=1e-9)
    assert frechet.distance(a @ turn, b[::-1] @ turn) == pytest.approx(want, rel=1e-9)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-9)


def test_a_small_sample_looks_farther_away():
    """Sixteen samples in eight dimensions: halves lie farther from their own distribution."""
    a, b = (normal(n, np.zeros(8), np.eye(8), seed=n) for n in (16, 4000))
    assert frechet.halves(a, b) > frechet.distance(a, b) > 0


def test_one_picture_has_no_covariance():
    with pytest.raises(ValueError, match="two or more"):
        frechet.distance(np.zeros((1, 3)), np.zeros((5, 3)))


# --- captions in part


def by_hand(a: str, b: str) -> int:
    if not a or not b:
        return len(a or b)
    change = by_hand(a[1:], b[1:]) + (a[0] != b[0])
    return min(change, by_hand(a[1:], b) + 1, by_hand(a, b[1:]) + 1)


def test_edits_of_every_pair_are_the_edit_distance():
    texts = ["", "red", "ared", "bred", "reed", "der", "a drawing of a Red "]
    got = partial.edit_likeness(texts, texts[:6])
    for i, a in enumerate([*texts[:6], "red"]):
        for j, b in enumerate(texts[:6]):
            longer = max(len(a), len(b), 1)
            assert got[i, j] == pytest.approx(1 - by_hand(a, b) / longer), (a, b)


def test_edits_are_near_what_difflib_calls_alike():
    a, b = "red race car with spots", "pink race car with spots"
    got = partial.edit_likeness([a], [b])[0, 0]
    assert abs(got - difflib.SequenceMatcher(None, a, b).ratio()) < 0.1 and got < 1


def test_words_in_common():
    got = partial.word_overlap(["a red race car", "blue"], ["red car", "the red race car", "x"])
    np.testing.assert_allclose(got, [[0.8, 1, 0], [0, 0, 0]])
    assert partial.word_overlap(["a drawing of a cat"], ["a drawing of a dog"]) == 0


def test_no_constant_answer_is_below_exchanged_ones():
    """In every KIND: the best constant is at least the mean of all exchanges."""
    _, labels = draw_all()
    captions = [openmoji_drawings.captions(x.colour, x.name) for x in labels]
    answers = [c[i % 3] for i, c in enumerate(captions)]
    scores = emoji.score_captions(answers, captions, labels)
    for kind in ("colour", "name", "words", "edits"):
        constant, shuffled = (scores[kind][x]["baseline"] for x in ("constant", "shuffled"))
        assert scores[kind]["mean"] == 1 and shuffled <= constant < 0.8, kind


def test_the_nearest_truth_of_each_picture_counts():
    scores = np.asarray([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]])
    got = partial.best_of(scores, [["a", "b"], ["c"]])
    np.testing.assert_array_equal(got, [[0.9, 0.3], [0.5, 0.4]])


# --- the judge


def test_features_do_not_depend_on_the_company(referee):
    pictures, labels = draw_all()
    every, alone = referee.pictures(pictures), referee.pictures(pictures[-1:])
    np.testing.assert_array_equal(every[-1:], alone)
    np.testing.assert_allclose(np.linalg.norm(every, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(referee.texts(labels), axis=1), 1, rtol=1e-5)
    assert len(referee.every_text()) == 36 and len(every) == 36


def test_what_the_judge_cannot_judge_is_refused(referee, tmp_path):
    with pytest.raises(ValueError, match="red dragon"):
        referee.texts([emoji.Label("dragon", "red")])
    with pytest.raises(ValueError, match="64 x 64"):
        referee.pictures([np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(CheckpointError, match="train_judge"):
        judge.load(tmp_path)
    judge.save(tmp_path, referee.cfg, {**referee.params, "scale": np.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="scale"):
        judge.load(tmp_path)


def test_right_pictures_score_above_wrong_ones(referee, monkeypatch):
    """With texts that mean the mean of their drawings: a referee that knows."""
    pictures, labels = draw_all(turn=4)
    real = real_drawings(labels)
    means = {x: referee.pictures(v).mean(0) for x, v in real.views.items()}
    centre = np.mean(list(means.values()), axis=0)  # a fresh tower's features are near one another
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    plain = judge.LoadedJudge.pictures

    def features(self, given):
        return unit(plain(self, given) - centre)

    def texts(self, given):
        return unit(np.stack([means[x] for x in given]) - centre)

    monkeypatch.setattr(judge.LoadedJudge, "pictures", features)
    monkeypatch.setattr(judge.LoadedJudge, "texts", texts)
    right = judged.alignment(referee, pictures, labels, real)
    assert right["likeness"]["beats"] and right["top1"] > 18 and right["drawn_top1"] > 18
    wrong = judged.alignment(referee, pictures[1:] + pictures[:1], labels, real)
    assert right["in_colour"]["beats"] and right["median_rank"] <= 2
    assert right["candidates"] == 12
    class_wrong = judged.alignment(referee, pictures[18:] + pictures[:18], labels, real)
    assert not class_wrong["in_colour"]["beats"] and class_wrong["median_rank"] > 3
    assert wrong["top1"] < 6 and wrong["likeness"]["score"] < right["likeness"]["score"] - 0.2
    half = labels[::2]
    near = judged.frechet_distance(referee, [pictures[labels.index(x)] for x in half], half, real)
    assert near["painted"] < near["other_prompts"] < near["noise"]
    assert near["of"] == 18 and near["reference"] == 36
    far = judged.frechet_distance(referee, judged.noise(pictures[:18]), half, real)
    assert far["painted"] == far["noise"] and far["drawn"] == near["drawn"]
    json.dumps([right, near], allow_nan=False)


def test_painting_is_scored_with_the_judge_and_the_same_twice(referee, shown, tmp_path):
    args = evaluate.parse(["--model", "x", "--prompts", "8"])
    one, two = (
        evaluate.paint(PerfectModel(), args, referee, tmp_path / f"{name}.png") for name in "ab"
    )
    assert json.dumps(one) == json.dumps(two)
    assert one["sheet"]["alignment"]["of"] == 24 and one["trained_pairs"]["frechet"]["of"] == 8
    said = evaluate.table(evaluate.verdicts(one))
    assert "judge's alignment, against shuffled prompts" in said and "(not FID)" in said
    assert len(evaluate.verdicts(one)) == 1 + 2 * 5 + 1
