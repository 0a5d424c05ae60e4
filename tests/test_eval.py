"""The scores of the quick start: right images and captions score above wrong ones."""

import difflib
import json

import numpy as np
import pytest
from helpers.drawings import SHAPES, draw, draw_all
from PIL import Image

from janusflow_jax.eval import sheet, stats as eval_stats
from janusflow_jax.openmoji import (
    drawings as openmoji_drawings,
    prompts as openmoji_prompts,
    scores as emoji,
    stats,
)

# --- hue


@pytest.mark.parametrize("color", openmoji_prompts.PALETTE)
def test_hue_of_a_palette_color(color):
    hue = emoji.dominant_hue(draw("round shape 5", color))
    assert emoji.hue_distance(hue, openmoji_prompts.PALETTE[color]) < 3


def test_hue_follows_the_larger_area_and_wraps_around():
    image = draw("round shape 4", "red").copy()
    image[:6] = (0, 0, 255)  # less than the red square
    assert emoji.hue_distance(emoji.dominant_hue(image), 0) < 3
    assert emoji.hue_distance(350, 10) == 20 and emoji.hue_distance(10, 350) == 20


def test_shades_count_together():
    """Two shades of red outweigh one flat green of more pixels than either."""
    rows = [(255, 0, 30)] * 3 + [(255, 30, 0)] * 3 + [(0, 255, 0)] * 4
    image = np.repeat(np.asarray(rows, np.uint8)[:, None], 10, axis=1)
    assert emoji.hue_distance(emoji.dominant_hue(image), 0) < 1


def test_gray_has_no_hue_and_is_never_right():
    gray = np.full((64, 64, 3), 128, np.uint8)
    assert np.isnan(emoji.dominant_hue(gray))
    labels = [emoji.Label("round shape 3", "red"), emoji.Label("round shape 4", "blue")]
    scores = emoji.score_hues([gray, draw("round shape 4", "blue")], labels)
    assert (scores["right"], scores["nearest"], scores["hues"][0]) == (1, 1, None)
    json.dumps(scores, allow_nan=False)


def test_hues_beat_shuffled_prompts_only_when_right():
    images, labels = draw_all()
    good = emoji.score_hues(images, labels)
    assert good["right"] == len(labels) and good["within"]["beats"]
    wrong = emoji.score_hues(images, labels[1:] + labels[:1])
    assert wrong["right"] == 0 and not wrong["within"]["beats"]


# --- retrieval


def test_retrieval_finds_other_views_and_not_wrong_images():
    gallery = emoji.make_gallery(*draw_all())
    images, labels = draw_all(turn=5, scale=0.8, shift=(3, -2))
    good = emoji.score_retrieval(images, labels, gallery)
    assert good["top1"] >= 0.9 * len(labels)
    assert good["candidates"] == len(SHAPES)
    assert good["percentile"]["beats"] and good["reciprocal_rank"]["beats"]
    order = np.random.default_rng(0).permutation(len(labels))
    wrong = emoji.score_retrieval([images[i] for i in order], labels, gallery)
    assert wrong["top1"] < 0.5 * len(labels) and not wrong["percentile"]["beats"]
    json.dumps(good, allow_nan=False)


def test_equal_images_stand_at_chance():
    """The same image for every prompt must not look like skill; nor must an empty one."""
    gallery = emoji.make_gallery(*draw_all())
    _, labels = draw_all()
    for image in (draw("round shape 3", "red"), np.full((64, 64, 3), 255, np.uint8)):
        scores = emoji.score_retrieval([image] * len(labels), labels, gallery)
        assert scores["percentile"]["score"] == pytest.approx(0.5, abs=0.02)
        assert not scores["percentile"]["beats"]


def test_candidates_are_in_the_color_that_was_asked_for():
    """A blue square for 'a red triangle' finds the red square, not a blue triangle's class."""
    a, b = "round shape 3", "round shape 4"
    labels = [emoji.Label(a, "red"), emoji.Label(a, "blue"), emoji.Label(b, "red")]
    drawn = [draw(a, "red"), draw(b, "blue"), draw(b, "red")]
    gallery = emoji.make_gallery(drawn, labels)
    table, candidates = emoji.ranks([draw(b, "blue")], labels[:1], gallery)
    assert table.tolist() == [[2.0]] and candidates == [2]


def test_a_color_alone_retrieves_nothing():
    gallery = emoji.make_gallery(*draw_all())
    _, labels = draw_all()
    flat = [draw("round shape 6", x.color) for x in labels]  # right color, one shape
    scores = emoji.score_retrieval(flat, labels, gallery)
    assert not scores["percentile"]["beats"]
    assert emoji.score_hues(flat, labels)["right"] == len(labels)


def test_gallery_has_as_many_views_of_each_label():
    a, b = emoji.Label("round shape 3", "red"), emoji.Label("round shape 4", "red")
    images = [draw(x.name, x.color) for x in (a, a, b)]
    gallery = emoji.make_gallery(images, [a, a, b])
    assert gallery.labels == (a, b)
    with pytest.raises(ValueError, match="pink shape 9"):
        emoji.ranks(images[:1], [emoji.Label("shape 9", "pink")], gallery)


# --- captions


def test_parse_caption():
    assert emoji.parse_caption("A drawing of a red race car.") == emoji.Label("race car", "red")
    assert emoji.parse_caption("an orange cat") == emoji.Label("cat", "orange")
    assert emoji.parse_caption("pink") == emoji.Label("", "pink")
    assert emoji.parse_caption("") == emoji.Label("", "")
    assert emoji.parse_caption("a car") == emoji.Label("car", "")


def test_every_caption_of_the_data_parses_to_its_label():
    for name in ("race car", "T-shirt", "cat"):
        for text in openmoji_drawings.captions("orange", name):
            assert emoji.parse_caption(text) == emoji.Label(name.lower(), "orange")


def _truth(count=40):
    names = ("cat", "dog", "race car", "key", "fish")
    colors = tuple(openmoji_prompts.PALETTE)
    labels = [emoji.Label(names[i % 5], colors[i % 8]) for i in range(count)]
    return labels, [openmoji_drawings.captions(x.color, x.name) for x in labels]


def test_right_captions_beat_both_baselines():
    labels, captions = _truth()
    scores = emoji.score_captions([c[0] for c in captions], captions, labels)
    for kind in ("exact", "color", "name"):
        assert scores[kind]["right"] == 40
        assert scores[kind]["constant"]["beats"] and scores[kind]["shuffled"]["beats"]
    json.dumps(scores, allow_nan=False)


def test_right_color_with_wrong_class_is_only_half_right():
    labels, captions = _truth()
    answers = [f"a {x.color} house" for x in labels]
    scores = emoji.score_captions(answers, captions, labels)
    assert (scores["exact"]["right"], scores["name"]["right"]) == (0, 0)
    assert scores["color"]["right"] == 40 and scores["color"]["constant"]["beats"]
    assert not scores["exact"]["shuffled"]["beats"]


def test_a_constant_answer_and_shuffled_answers_beat_nothing():
    labels, captions = _truth()
    constant = emoji.score_captions(["a red cat"] * 40, captions, labels)
    rolled = emoji.score_captions([c[0] for c in captions[1:] + captions[:1]], captions, labels)
    for scores in (constant, rolled):
        for kind in ("exact", "color", "name"):
            assert not scores[kind]["constant"]["beats"]
            assert not scores[kind]["shuffled"]["beats"]


def edit_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a or b)
    change = edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(change, edit_distance(a[1:], b) + 1, edit_distance(a, b[1:]) + 1)


def test_edits_of_every_pair_are_the_edit_distance():
    texts = ["", "red", "ared", "bred", "reed", "der", "a drawing of a Red "]
    got = emoji.edit_similarity(texts, texts[:6])
    for i, a in enumerate([*texts[:6], "red"]):
        for j, b in enumerate(texts[:6]):
            longer = max(len(a), len(b), 1)
            assert got[i, j] == pytest.approx(1 - edit_distance(a, b) / longer), (a, b)


def test_edit_similarity_is_near_that_of_difflib():
    a, b = "red race car with spots", "pink race car with spots"
    got = emoji.edit_similarity([a], [b])[0, 0]
    assert abs(got - difflib.SequenceMatcher(None, a, b).ratio()) < 0.1 and got < 1


def test_words_in_common():
    got = emoji.word_overlap(["a red race car", "blue"], ["red car", "the red race car", "x"])
    np.testing.assert_allclose(got, [[0.8, 1, 0], [0, 0, 0]])
    assert emoji.word_overlap(["a drawing of a cat"], ["a drawing of a dog"]) == 0


def test_no_constant_answer_is_below_shuffled_ones():
    """In every KIND: the best constant is at least the mean of all shuffles."""
    _, labels = draw_all()
    captions = [openmoji_drawings.captions(x.color, x.name) for x in labels]
    answers = [c[i % 3] for i, c in enumerate(captions)]
    scores = emoji.score_captions(answers, captions, labels)
    for kind in ("color", "name", "words", "edits"):
        constant, shuffled = (scores[kind][x]["baseline"] for x in ("constant", "shuffled"))
        assert scores[kind]["mean"] == 1 and shuffled <= constant < 0.8, kind


def test_the_nearest_caption_of_each_image_counts():
    scores = np.asarray([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]])
    got = emoji.best_of(scores, [["a", "b"], ["c"]])
    np.testing.assert_array_equal(got, [[0.9, 0.3], [0.5, 0.4]])


# --- intervals


def test_interval_covers_and_is_the_same_again():
    generator = np.random.default_rng(0)
    hits = 0
    for n in range(60):
        values = generator.normal(1.0, 1.0, 50)
        low, high = eval_stats.score(values).interval(n)
        hits += low < 1.0 < high
    assert 52 <= hits <= 60  # 95 %: 57 wanted
    assert eval_stats.score(values).interval(3) == eval_stats.score(values).interval(3)


def test_views_of_one_group_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(0, 1, 20)
    low, high = eval_stats.score(values).interval()
    many = eval_stats.score(
        np.repeat(values, 10), groups=np.repeat(np.arange(20), 10).tolist()
    ).interval()
    assert many == pytest.approx((low, high), abs=1e-9)


def test_against_others_is_the_mean_over_all_shuffles():
    own, others = stats.against_others(np.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 10]]))
    assert own.tolist() == [1, 5, 10] and others.tolist() == [2.5, 5.0, 7.5]


# --- the sheet


def test_sheet_shows_every_image_as_generated_with_its_label():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    images = [Image.new("RGB", (64, 64), c) for c in colors]
    labels = ["a red apple", "", "a very long label of many words that does not fit", "x" * 90]
    grid = np.asarray(sheet.image_grid(images, labels, columns=3, scale=2))
    for color in colors:
        assert (grid == color).all(-1).sum() == 128 * 128
    assert (grid.sum(-1) < 60).sum() > 50  # dark text
    assert sheet.image_grid(images[:1], [""]).width < 160
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    grid = np.asarray(sheet.image_grid([noise], [""], scale=2))
    np.testing.assert_array_equal(grid[8:136, 8:136], noise.repeat(2, 0).repeat(2, 1))
