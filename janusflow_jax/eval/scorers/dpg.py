"""DPG-Bench: scores from the answers that its script writes to `..._detail.txt`.

The script (TencentQQGYLab/ELLA) asks a visual question answering model about every image. Its
overall score is right except for one prompt; its scores of categories are not (`score`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence

from janusflow_jax.config.errors import DataError
from janusflow_jax.eval import stats

CROPS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Column and row of the images of a 2 x 2 grid, in the script's order."""

_LINE = re.compile(r"(.+?), \((\d+), (\d+), (\d+), (\d+)\), (.*)")


@dataclasses.dataclass(frozen=True)
class Question:
    """number: of the question in its prompt; parents: numbers, 0 for none; category: 'level 1 -
    level 2'."""

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


Answers = dict[str, list[dict[int, bool]]]
"""Prompt id -> for each image whether each question, by its number, was answered with yes."""


def read_questions(text: str) -> dict[str, list[Question]]:
    """Contents of dpg_bench.csv -> the questions of each prompt id, in the file's order.

    Raises: DataError: rows without the columns, or twice the same question.
    """
    out: dict[str, list[Question]] = {}
    for n, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        try:
            question = Question(
                int(row["proposition_id"]),
                tuple(int(parent) for parent in row["dependency"].split(",")),
                row["tuple"].split("(")[0].strip(),
                row["question_natural_language"],
            )
            own = out.setdefault(row["item_id"], [])
        except (KeyError, ValueError, AttributeError, TypeError) as e:
            raise DataError(
                f"dpg_bench.csv, row {n}: expected the columns of DPG-Bench; got {e!r}: "
                "use the original file"
            ) from e
        if question.number in {q.number for q in own}:
            raise DataError(
                f"dpg_bench.csv, row {n}: question {question.number} of {row['item_id']} is there "
                "twice: use the original file"
            )
        own.append(question)
    return out


def with_first_row_twice(text: str) -> str:
    """A copy of dpg_bench.csv for the script, which never reads the first row.

    Without it one prompt loses a question, and is left out if another question depends on it.
    """
    rows = list(csv.reader(io.StringIO(text)))
    out = io.StringIO()
    csv.writer(out).writerows([*rows[:2], *rows[1:]])
    return out.getvalue()


def read_detail(
    text: str,
    questions: Mapping[str, Sequence[Question]],
    resolution: int,
    images_per_prompt: int = 4,
) -> Answers:
    """Contents of `..._detail.txt` -> the answers of every prompt.

    Args:
      resolution: side of one image of the grid, as the script was called with.
    Raises:
      DataError: a line, crop or prompt that does not belong there, or an answer that is missing.
    """
    lines: dict[tuple[str, int], list[str]] = {}
    crops: list[tuple[int, ...]] = [
        (x * resolution, y * resolution, (x + 1) * resolution, (y + 1) * resolution)
        for x, y in CROPS[:images_per_prompt]
    ]
    for n, line in enumerate(text.strip("\n").split("\n"), 1):
        match = _LINE.fullmatch(line)
        crop = tuple(int(x) for x in match.groups()[1:5]) if match else ()
        name = re.split(r"[/\\]", match[1])[-1].split(".")[0] if match else ""
        if not match or crop not in crops or name not in questions:
            raise DataError(
                f"detail file, line {n}: expected a prompt of the benchmark and one of the crops "
                f"{crops}; got {line[:100]!r}: run the script with --resolution {resolution}"
            )
        lines.setdefault((name, crops.index(crop)), []).append(match[6])
    out: Answers = {}
    for name, own in questions.items():
        for image in range(images_per_prompt):
            got = lines.get((name, image), [])
            texts = [question.text for question in own]
            if len(got) != len(own) or not all(map(str.startswith, got, texts)):
                raise DataError(
                    f"detail file, {name}, image {image}: expected the answers to its {len(own)} "
                    f"questions; got {len(got)}: run the script again, with the image and the "
                    "copy of the CSV file"
                )
            yes = [g.removeprefix(f"{t}, ") == "yes" for g, t in zip(got, texts, strict=True)]
            out.setdefault(name, []).append({q.number: y for q, y in zip(own, yes, strict=True)})
    return out


def with_dependencies(yes: Mapping[int, bool], questions: Sequence[Question]) -> dict[int, bool]:
    """Answers of one image, where a question with any parent that is not a yes is a no.

    Raises: DataError: a parent that is not a question of the prompt.
    """
    out = dict(yes)
    for question in questions:
        parents = [parent for parent in question.parents if parent]
        if lost := {*parents} - {*out}:
            raise DataError(
                f"question {question.text!r}: expected its parents in the prompt; got none of "
                f"{sorted(lost)}: use the original dpg_bench.csv"
            )
        out[question.number] = out[question.number] and all(out[parent] for parent in parents)
    return out


def score(questions: Mapping[str, Sequence[Question]], answers: Answers) -> dict[str, stats.Score]:
    """Scores in percent.

    NOTE(parity): the script takes its scores of categories from the last image of each prompt,
    without dependencies, and mixes the categories of several processes. Here they are the mean over
    all images, with dependencies; the names that end in ' alone' are without.

    Returns:
      overall: mean over prompts of the mean over images of the share of yes, DPG-Bench's number;
      each category, 'level 1' and 'level 1 - level 2', with and without dependencies.
    """
    prompts, names = [], []
    categories: dict[str, tuple[list[bool], list[str]]] = {}
    for name, images in answers.items():
        own, shares = questions[name], []
        for yes in images:
            counted = with_dependencies(yes, own)
            shares.append(sum(counted.values()) / len(counted))
            for question in own:
                for level in {question.category.split("-")[0].strip(), question.category}:
                    for suffix, values in (("", counted), (" alone", yes)):
                        rows = categories.setdefault(level + suffix, ([], []))
                        rows[0].append(values[question.number])
                        rows[1].append(name)
        prompts.append(sum(shares) / len(shares))
        names.append(name)
    out = {"overall": stats.by_category(prompts, groups=names)["overall"]}
    for level in sorted(categories):
        values, groups = categories[level]
        out[level] = stats.by_category(values, groups=groups)["overall"]
    return out
