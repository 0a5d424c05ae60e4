"""The judge and its two scores, on sets with known answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.drawings import draw_all, real_drawings

from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.openmoji import judge


def test_features_do_not_depend_on_the_other_images(referee):
    images, labels = draw_all()
    every, alone = referee.embed_images(images), referee.embed_images(images[-1:])
    np.testing.assert_array_equal(every[-1:], alone)
    np.testing.assert_allclose(np.linalg.norm(every, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(referee.embed_texts(labels), axis=1), 1, rtol=1e-5)
    assert len(referee.embed_texts(referee.cfg.labels)) == 36 and len(every) == 36


def test_what_the_judge_cannot_judge_is_refused(referee, tmp_path):
    with pytest.raises(ValueError, match="64 x 64"):
        referee.embed_images([np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(CheckpointError, match="train_judge"):
        judge.load(tmp_path)


def test_right_images_score_above_wrong_ones(referee, monkeypatch):
    """With texts that mean the mean of their drawings: a referee that knows."""
    images, labels = draw_all(turn=4)
    views, unseen = real_drawings(labels)
    real = [views[x][0] for x in labels]
    means = {x: referee.embed_images(v).mean(0) for x, v in views.items()}
    center = np.mean(list(means.values()), axis=0)  # a fresh tower's features are near one another
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    plain = judge.LoadedJudge.embed_images

    def features(self, x):
        return unit(plain(self, x) - center)

    def texts(self, x):
        return unit(np.stack([means[y] for y in x]) - center)

    monkeypatch.setattr(judge.LoadedJudge, "embed_images", features)
    monkeypatch.setattr(judge.LoadedJudge, "embed_texts", texts)
    right = judge.score_alignment(referee, images, labels, real)
    assert right["likeness"]["beats"] and right["top1"] > 18 and right["drawn_top1"] > 18
    wrong = judge.score_alignment(referee, images[1:] + images[:1], labels, real)
    assert right["in_color"]["beats"] and right["median_rank"] <= 2
    assert right["candidates"] == 12
    class_wrong = judge.score_alignment(referee, images[18:] + images[:18], labels, real)
    assert not class_wrong["in_color"]["beats"] and class_wrong["median_rank"] > 3
    assert wrong["top1"] < 6 and wrong["likeness"]["score"] < right["likeness"]["score"] - 0.2
    half, rest = labels[::2], labels[1::2]
    drawings = {
        "reference": [x for label in half for x in views[label]],
        "drawn": [unseen[x] for x in half],
        "other_prompts": [unseen[x] for x in rest],
    }
    near = judge.score_frechet(referee, images[::2], **drawings)
    assert near["painted"] < near["other_prompts"] < near["noise"]
    assert near["of"] == 18 and near["reference"] == 36
    far = judge.score_frechet(referee, judge.noise(images[:18]), **drawings)
    assert far["painted"] == far["noise"] and far["drawn"] == near["drawn"]
    json.dumps([right, near], allow_nan=False)
