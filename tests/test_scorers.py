"""The scorers of benchmarks equal the published ones, but for bugs of those that are named here.

tests/data/scorers/README.md says where the expected numbers come from.
"""

import csv
import io
import json
import pathlib

import numpy as np
import pytest

from janusflow_jax.config.errors import DataError
from janusflow_jax.eval import stats
from janusflow_jax.eval.scorers import choice, dpg, geneval, gqa, mmmu, vqa, yesno

DATA = pathlib.Path(__file__).parent / "data" / "scorers"
EXPECTED = json.loads((DATA / "expected.json").read_text())


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def fractions(scores: dict[str, stats.Score]) -> dict[str, float]:
    return {name: score.value / 100 for name, score in scores.items()}


# --- scores and their intervals


def test_a_score_is_a_ratio_in_each_stratum():
    values, weights, strata = [2.0, 0.0, 1.0, 3.0], [2.0, 2.0, 1.0, 4.0], ["a", "a", "b", "b"]
    assert stats.score(values, weights).value == pytest.approx(6 / 9)
    assert stats.score(values, weights, strata=strata).value == pytest.approx((2 / 4 + 4 / 5) / 2)
    assert stats.score(values, weights, strata=strata, total=True).value == pytest.approx(1.3)
    assert stats.score([0.0, 0.0], [0.0, 0.0]).value == 0


def test_weights_are_as_rows_of_one_group():
    weights = np.asarray([3, 1, 2, 5, 1, 4, 0])
    values = np.asarray([2, 0, 1, 5, 1, 0, 0])
    rows = [float(i < v) for v, w in zip(values, weights, strict=True) for i in range(w)]
    groups = np.repeat(np.arange(6), weights[:6]).tolist()
    got, want = stats.score(values[:6], weights[:6]), stats.score(rows, groups=groups)
    assert got.value == pytest.approx(want.value)
    assert got.interval() == pytest.approx(want.interval())
    half = stats.score(values, np.full(7, 2.0)).interval()
    assert half == pytest.approx(np.asarray(stats.score(values).interval()) / 2)
    # A row without weight (POPE: a right "no") changes the spread, not the value.
    more = stats.score(values, weights)
    assert more.value == got.value and more.interval() != got.interval()


def test_strata_are_resampled_apart():
    """Strata without spread inside them leave no spread, however different they are."""
    strata = ["a"] * 10 + ["b"] * 10
    score = stats.score([1.0] * 10 + [0.0] * 10, strata=strata)
    assert score.interval() == (0.5, 0.5)
    low, high = stats.score([1.0] * 10 + [0.0] * 10).interval()
    assert low < 0.5 < high


def test_interval_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    whole = stats.score(values).interval()
    monkeypatch.setattr(stats, "_DRAWS_AT_ONCE", 1000)
    assert stats.score(values).interval() == whole


# --- yes or no


@pytest.mark.parametrize(
    "rule", ["pope_official", "whole_word", "exactly", "mme_official", "mme_lmms_eval"]
)
def test_yes_or_no_rules(rule):
    for row in rows_of("yesno"):
        assert getattr(yesno, rule)(row["answer"]) == row[rule], row["answer"]


def pope_of(rule, split: str | None = None, **kwargs) -> dict[str, float]:
    rows = [row for row in rows_of("pope") if split in (None, row["split"])]
    labels = [rule(row["answer"]) for row in rows]
    return fractions(yesno.pope(labels, [row["gold"] for row in rows], **kwargs))


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope(split):
    want = {rule: scores[split] for rule, scores in EXPECTED["pope"].items()}
    assert pope_of(yesno.pope_official, split) == pytest.approx(want["official"])
    got = pope_of(yesno.whole_word, split)
    assert {name: got[name] for name in want["vlmevalkit"]} == pytest.approx(want["vlmevalkit"])
    got = pope_of(yesno.exactly, split, unparsed_is_no=False)
    # Its "yes ratio" is that of the gold answers, whatever the model says.
    assert want["lmms_eval"]["yes_ratio"] == 0.5 != got["yes_ratio"]
    assert got | {"yes_ratio": 0.5} == pytest.approx(want["lmms_eval"])


def test_pope_of_all_splits():
    got = pope_of(yesno.whole_word)
    del got["yes_ratio"]
    assert got == pytest.approx(EXPECTED["pope"]["vlmevalkit"]["Overall"])


def test_lmms_eval_leaves_yes_with_a_period_out_of_recall():
    labels, golds = [yesno.exactly(a) for a in ("yes", "Yes.")], ["yes", "yes"]
    assert yesno.pope(labels, golds, unparsed_is_no=False)["recall"].value == 100
    assert yesno.pope(labels, golds)["recall"].value == 50
    labels = [yesno.whole_word(a) for a in ("yes", "Yes.")]
    assert yesno.pope(labels, golds)["recall"].value == 100


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (yesno.mme_official, "official"),
        (yesno.whole_word, "vlmevalkit"),
        (yesno.mme_lmms_eval, "lmms_eval"),
    ],
)
def test_mme(rule, reference):
    rows = rows_of("mme")
    columns = [[row[name] for row in rows] for name in ("gold", "task", "image")]
    scores = yesno.mme([rule(row["answer"]) for row in rows], *columns)
    got = {name: scores[name].value for name in EXPECTED["mme"][reference]}
    assert got == pytest.approx(EXPECTED["mme"][reference])
    low, high = scores["perception"].interval()
    assert low < scores["perception"].value < high <= 2000


def test_mme_needs_pairs_and_all_tasks_for_a_sum():
    scores = yesno.mme(["yes", "no"], ["yes", "no"], ["OCR"] * 2, [1, 1])
    assert {name: score.value for name, score in scores.items()} == {"OCR": 200}
    with pytest.raises(DataError):
        yesno.mme(["yes"] * 3, ["yes"] * 3, ["OCR"] * 3, [1, 1, 2])
    with pytest.raises(DataError):
        yesno.pope(["yes"], ["maybe"])


# --- letters


@pytest.mark.parametrize("rule", ["vlmevalkit", "whole_answer", "first_character"])
def test_letter_rules(rule):
    for row in rows_of("letters"):
        assert getattr(choice, rule)(row["answer"], row["options"]) == row[rule], row["answer"]


def test_mmbench():
    rows = rows_of("mmbench")
    letters = [choice.vlmevalkit(row["answer"], row["options"]) for row in rows]
    columns = [[row[name] for row in rows] for name in ("gold", "index", "category")]
    scores = choice.mmbench(letters, *columns)
    assert fractions(scores) == pytest.approx(EXPECTED["mmbench"])
    # Rotations of a question depend on each other.
    assert len({*scores["vanilla_all"].groups}) == 8
    keep = [i for i, row in enumerate(rows) if row["index"] != 3]
    with pytest.raises(DataError):
        choice.mmbench(*[[column[i] for i in keep] for column in (letters, *columns)])


def test_accuracy_of_categories():
    scores = choice.accuracy(["A", None, "B"], ["A", "A", "B"], ["x", "x", "y"], groups=[1, 1, 2])
    assert fractions(scores) == pytest.approx({"overall": 2 / 3, "x": 1 / 2, "y": 1})
    assert scores["overall"].groups == (1, 1, 2) and scores["x"].groups == (1, 1)


# --- short answers


def test_vqa():
    rows = rows_of("vqa")
    for row in rows:
        for rule in ("official", "lmms_eval"):
            want = row[rule]
            if rule == "official" and (row["answer"], want) == ("Yes", 0):
                want = 1.0  # the script minds case only if all ten answers are equal
            got = getattr(vqa, rule)(row["answer"], row["golds"])
            assert got == pytest.approx(want), (rule, row["answer"], row["golds"])
    assert any(row["official"] != row["lmms_eval"] for row in rows)
    outcomes = [vqa.official(row["answer"], row["golds"]) for row in rows]
    assert {round(10 * x) for x in outcomes} == {0, 3, 6, 9, 10}
    scores = stats.by_category([1.0, 0.3, 0.6], ["yes/no", "other", "other"])
    assert fractions(scores) == pytest.approx({"overall": 1.9 / 3, "yes/no": 1, "other": 0.45})


def test_gqa():
    for row in rows_of("gqa"):
        for rule in ("official", "llava", "vlmevalkit", "lmms_eval"):
            assert getattr(gqa, rule)(row["answer"], row["gold"]) == row[rule], (rule, row)


def test_mmmu():
    rows = rows_of("mmmu")
    for row in rows:
        for rule in ("official", "vlmevalkit"):
            got = getattr(mmmu, rule)(row["answer"], row["gold"], row["options"])
            assert got == row[rule], (rule, row)
    # lmms-eval at that commit: open answers are never right; the last letter of a word is a letter.
    open_rows = [row for row in rows if not row["options"]]
    assert sum(row["official"] for row in open_rows) > 15
    assert not any(row["lmms_eval"] for row in open_rows)
    assert any(row["lmms_eval"] != row["official"] for row in rows if row["options"])


def test_mmmu_counts_unparsed_choices_as_wrong_or_as_chance():
    options = [{"A": "x", "B": "y", "C": "z", "D": "u"}, None, {"A": "x", "B": "y"}]
    scores = mmmu.accuracy([None, 1.0, 0.0], options, ["Art", "Art", "Math"])
    want = {"overall": 1 / 3, "with_chance": 1.25 / 3, "Art": 0.5, "Math": 0}
    assert fractions(scores) == pytest.approx(want)


# --- images


def geneval_results() -> list[dict]:
    """The lines of a results.jsonl."""
    return [
        {
            "filename": f"{i}.png",
            "tag": row["metadata"]["tag"],
            "correct": row["correct"],
            "metadata": json.dumps(row["metadata"]),
            "details": json.dumps(row["details"]),
        }
        for i, row in enumerate(rows_of("geneval"))
    ]


def test_geneval_rules():
    for row in rows_of("geneval"):
        objects = {name: np.asarray(boxes) for name, boxes in row["details"].items()}

        def colors(name, boxes, row=row):
            return [row["colors"][name][row["boxes"][name].index(box.tolist())] for box in boxes]

        reasons = geneval.evaluate(objects, row["metadata"], colors)
        assert reasons == row["reasons"], row
        assert row["correct"] == (not reasons)


def test_geneval_summary():
    got = geneval.summary(geneval_results())
    # Its script prints percentages with two decimals.
    assert fractions(got) == pytest.approx(EXPECTED["geneval"], abs=6e-5)
    # The mean over tasks, not over images.
    assert got["overall"].value != pytest.approx(got["images"].value, abs=1)


def test_geneval_finds_verdicts_that_do_not_follow_from_the_boxes():
    results = geneval_results()
    assert geneval.contradictions(results) == []
    flipped = [{**row, "correct": not row["correct"]} for row in results]
    # The file has no colors: that a color is wrong or right cannot be seen.
    seen = [
        not any("color" in clause for clause in row["metadata"]["include"])
        or bool({*row["reasons"]} - {"color"})
        for row in rows_of("geneval")
    ]
    names = [row["filename"] for row, flag in zip(results, seen, strict=True) if flag]
    assert geneval.contradictions(flipped) == names and 30 < len(names) < len(results)


def dpg_files() -> tuple[str, str]:
    return (DATA / "dpg_questions.csv").read_text(), (DATA / "dpg_detail.txt").read_text()


def test_dpg():
    table, detail = dpg_files()
    questions = dpg.read_questions(table)
    answers = dpg.read_detail(detail, questions, resolution=8)
    scores = dpg.score(questions, answers)
    assert scores["overall"].value == pytest.approx(EXPECTED["dpg"]["overall"])
    assert len(scores["overall"].values) == 6
    assert scores["entity"].value <= scores["entity alone"].value


def test_dpg_script_scores_categories_from_the_last_image_without_dependencies():
    table, detail = dpg_files()
    questions = dpg.read_questions(table)
    answers = dpg.read_detail(detail, questions, resolution=8)
    last = {name: images[-1:] for name, images in answers.items()}
    got, want = dpg.score(questions, last), EXPECTED["dpg"]["script_categories"]
    assert {name: got[f"{name} alone"].value for name in want} == pytest.approx(want)
    whole = dpg.score(questions, answers)
    assert whole["entity alone"].value != pytest.approx(want["entity"])


def test_dpg_script_loses_the_first_prompt_of_the_plain_table():
    """With the copy it scores all of them (`test_dpg`)."""
    table, detail = dpg_files()
    assert EXPECTED["dpg"]["prompts_lost"] == 1
    questions = dpg.read_questions(table)
    answers = dpg.read_detail(detail, questions, resolution=8)
    del answers["first1"]
    rest = dpg.score(questions, answers)["overall"].value
    assert rest == pytest.approx(EXPECTED["dpg"]["overall_of_the_plain_csv"])

    rows, copy = [
        list(csv.reader(io.StringIO(text))) for text in (table, dpg.with_first_row_twice(table))
    ]
    assert copy == [*rows[:2], *rows[1:]]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [*lines, lines[0]],
        lambda lines: [line for line in lines if "/beta.png" not in line],
        lambda lines: [lines[0].replace("(0, 0, 8, 8)", "(0, 0, 16, 16)"), *lines[1:]],
        lambda lines: [lines[0].replace(".png", "0.png"), *lines[1:]],
        lambda lines: ["yes", *lines],
    ],
)
def test_dpg_detail_file_must_be_whole(change):
    table, detail = dpg_files()
    questions = dpg.read_questions(table)
    with pytest.raises(DataError):
        dpg.read_detail("\n".join(change(detail.splitlines())), questions, resolution=8)


def test_dpg_table_must_be_the_original():
    table, _ = dpg_files()
    for wrong in (table.replace("proposition_id", "id"), dpg.with_first_row_twice(table)):
        with pytest.raises(DataError):
            dpg.read_questions(wrong)
    questions = dpg.read_questions(table.replace('"1,2"', '"1,7"'))
    answers = {"first1": [{1: True, 2: True, 3: True}]}
    with pytest.raises(DataError):
        dpg.score(questions, answers)
