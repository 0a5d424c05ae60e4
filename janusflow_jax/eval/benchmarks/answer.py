"""Asks a model the questions of a benchmark.

    out/manifest/       settings.json, and a mark of each batch with its answers
    out/answers.jsonl   an answer for every question, in the order of the data

Equal questions about the same image are asked once. Answers are greedy. Scores are computed from
the stored answers (`report.py`), so a rule may change without asking the model again.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float

from janusflow_jax import pipeline
from janusflow_jax.config import files
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.data import chat_format
from janusflow_jax.eval.benchmarks import plan, read
from janusflow_jax.eval.benchmarks.read import Data, ImageKey, Question
from janusflow_jax.sampling import inputs

MANIFEST, ANSWERS = "manifest", "answers.jsonl"
FIRST_TOKENS = 32
"""All questions get so many new tokens; those without an end then get all that are allowed."""
KEPT_IMAGES = 256
"""Images whose vectors stay on the device for later questions."""

MMVET_SYSTEM = (
    "You are a helpful assistant. Please answer truthfully and write out your thinking step by "
    "step to be sure you get the right answer."
)
_YES_NO = ("pope", "mme")
_CHOICE = ("mmbench-dev-en", "seed-image", "mmmu-val")
_SHORT = "\nAnswer the question using a single word or phrase."


# --- prompts


def _janus(name: str, question: Question) -> str:
    """The prompts of the authors of Janus, by their class in VLMEvalKit (`vlmeval/vlm/janus.py`).

    GQA and VQAv2 are not in that class; their form is that of the other short questions.
    """
    text = question.text
    if name == "mmvet":
        return f"\n{text}"
    if name in _CHOICE:
        hint = f"\nHint: {question.hint}\n" if question.hint else "\n"
        options = "".join(f"{letter}. {x}\n" for letter, x in question.options.items())
        if not options:
            return f"{hint}{text}\nAnswer the question directly. "
        letter = "Answer with the option's letter from the given choices directly."
        return f"{hint}{text}\n{options}\n{letter}"
    if name == "pope":
        text = text.replace(" Please answer yes or no.", "")
    return f"\n{text}{_SHORT}"


def _vlmevalkit(name: str, question: Question) -> str:
    """VLMEvalKit's prompts for models without their own."""
    if name in _CHOICE:
        hint = f"Hint: {question.hint}\n" if question.hint else ""
        options = "".join(f"{letter}. {x}\n" for letter, x in question.options.items())
        if options:
            options = (
                f"Options:\n{options}Please select the correct answer from the options above. \n"
            )
        return f"{hint}Question: {question.text}\n{options}"
    if name in (*_YES_NO, "mmvet"):
        return question.text
    return f"{question.text}{_SHORT}"


_FORMS = {"janus": _janus, "vlmevalkit": _vlmevalkit}
WITH_SYSTEM = "-system"
PROTOCOLS = tuple(f"{form}{system}" for form in _FORMS for system in ("", WITH_SYSTEM))
"""'janus': the authors', without a system prompt. 'vlmevalkit': VLMEvalKit's own prompts. A name
that ends in '-system' has the system prompt of the chat in front."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the model is asked. `text` follows the images."""

    images: tuple[ImageKey, ...]
    system: str
    text: str


def request(name: str, question: Question, protocol: str) -> Request:
    """The request of a question in a protocol.

    Raises: ConfigError: no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol: expected one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    system = MMVET_SYSTEM if name == "mmvet" else ""
    if protocol.endswith(WITH_SYSTEM):
        system = chat_format.SYSTEM_PROMPT
    text = _FORMS[protocol.removesuffix(WITH_SYSTEM)](name, question)
    return Request(question.images, system, text)


def distinct(name: str, data: Data, protocol: str) -> list[Request]:
    """All different requests, those about the same images together."""
    asked = dict.fromkeys(request(name, question, protocol) for question in data.questions)
    first: dict[tuple[ImageKey, ...], int] = {}
    for one in asked:
        first.setdefault(one.images, len(first))
    return sorted(asked, key=lambda one: first[one.images])


# --- the model


def check_batch_size(size: int) -> None:
    """Raises ConfigError: a batch that the programs would round up."""
    if size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        raise ConfigError(f"--batch: expected a power of two up to 256; got {size}")


def run(
    name: str,
    data: Data,
    model: pipeline.Pipeline,
    out: epath.Path,
    settings: dict[str, Any],
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, int]]:
    """Answers the requests of this process that are not answered yet.

    Args:
      name: of the benchmark.
      settings: all that the answers depend on (`plan.Manifest`), among them protocol, pixels,
        max_new_tokens and batch, a power of two.
      shard: as of `plan.shard`.
    Yields:
      requests of this process that are done, and all of them: at first, and after each batch.
    Raises:
      ConfigError: `out` has a run with other settings.
      DataError: an image that cannot be read.
      JanusFlowError: a question that is too long.
      DivergedError: the logits are non-finite.
    """
    asked = distinct(name, data, settings["protocol"])
    shapes = []
    for one in asked:
        length = len(_encoded(model, one).ids)
        if length + settings["max_new_tokens"] > model.text.max_length:
            raise DataError(
                f"question {one.text[:80]!r}: expected at most {model.text.max_length} positions; "
                f"got {length} and {settings['max_new_tokens']} to generate: use a smaller "
                "--max-new-tokens"
            )
        shapes.append((inputs.length_bucket(length), len(one.images)))
    batches = plan.batches(shapes, settings["batch"])
    mine = [b for b in batches if b.index % shard[1] == shard[0]]
    manifest = plan.Manifest(out / MANIFEST, settings)
    marks = manifest.marks()
    todo = [b for b in mine if b.index not in marks]
    total = sum(b.count for b in mine)
    done = total - sum(b.count for b in todo)
    vectors = _Vectors(model, data, settings["pixels"], settings["batch"])
    yield done, total
    for batch in todo:
        rows = [asked[n] for n in batch.rows]
        answers = _answers(model, rows, batch.count, vectors, settings["max_new_tokens"])
        records = [{"request": n, **x} for n, x in zip(batch.units, answers, strict=True)]
        manifest.commit(batch.index, {"answers": records})
        done += batch.count
        yield done, total


def _encoded(model: pipeline.Pipeline, one: Request) -> chat_format.Encoded:
    content = model.text.image_tag * len(one.images) + one.text
    turns = [{"role": "user", "content": content}]
    return model.text.conversation(turns, len(one.images), closed=False, system=one.system)


def _answers(
    model: pipeline.Pipeline,
    rows: Sequence[Request],
    count: int,
    vectors: _Vectors,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Greedy answers of the first `count` rows.

    Few answers are long. So all rows get few tokens first, and those that did not end start again
    with room for all; greedy decoding gives them the same first tokens.
    """
    first = min(FIRST_TOKENS, max_new_tokens)
    prompts = [_encoded(model, one) for one in rows]
    slots = vectors.of([key for one in rows for key in one.images])
    tokens = model.greedy_tokens(prompts, slots, first)
    eos = model.text.eos_id
    again = [n for n in range(count) if tokens[n][-1] != eos] if max_new_tokens > first else []
    if again:
        filled = again + again[-1:] * (len(rows) - len(again))
        slots = vectors.of([key for n in filled for key in rows[n].images])
        longer = model.greedy_tokens([prompts[n] for n in filled], slots, max_new_tokens)
        for n, ids in zip(again, longer, strict=False):
            tokens[n] = ids
    return [
        {
            "tokens": len(ids),
            "answer": model.text.decode(ids).strip(),
            "truncated": ids[-1] != eos,
        }
        for ids in tokens[:count]
    ]


class _Vectors:
    """The vectors of images in prompts, computed once for the questions that follow each other.

    The encoder always gets batches of one size, so that the images beside it change no bit.
    """

    def __init__(self, model: pipeline.Pipeline, data: Data, pixels: str, size: int) -> None:
        self._model, self._data, self._pixels, self._size = model, data, pixels, size
        self._kept: OrderedDict[ImageKey, Float[Array, "S D"]] = OrderedDict()

    def of(self, keys: Sequence[ImageKey]) -> Float[Array, "M S D"] | None:
        """The vectors of images; None: no images."""
        if not keys:
            return None
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        for begin in range(0, len(missing), self._size):
            part = missing[begin : begin + self._size]
            with futures.ThreadPoolExecutor() as pool:
                images = list(pool.map(self._read, part))
            slots = self._model.understanding_slots(images + images[-1:] * (self._size - len(part)))
            assert slots is not None
            self._kept |= {key: slots[n] for n, key in enumerate(part)}
        for key in keys:
            self._kept.move_to_end(key)
        stacked = jnp.stack([self._kept[key] for key in keys])
        while len(self._kept) > KEPT_IMAGES:
            self._kept.popitem(last=False)
        return stacked

    def _read(self, key: ImageKey) -> Any:
        try:
            return read.pixels(self._data.images[key], self._pixels)
        except DataError as error:
            raise DataError(f"the image with SHA-256 {key}: {error}") from error


# --- the answers of a run


def collect(name: str, data: Data, out: epath.Path) -> list[dict[str, Any]] | None:
    """Writes `answers.jsonl` of a run; its lines. None: other processes are not done yet."""
    settings = plan.read_settings(out / MANIFEST)
    asked = distinct(name, data, settings["protocol"])
    marks = plan.read_marks(out / MANIFEST).values()
    answers = {asked[x.pop("request")]: x for mark in marks for x in mark["answers"]}
    if len(answers) < len(asked):
        return None
    lines = []
    for question in data.questions:
        one = request(name, question, settings["protocol"])
        lines.append(
            {
                "id": question.id,
                "images": list(one.images),
                "system": one.system,
                "prompt": one.text,
                **answers[one],
            }
        )
    with files.replacing(out / ANSWERS) as part:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        part.write_text(text, encoding="utf-8")
    return lines


def read_answers(path: Any, data: Data) -> list[dict[str, Any]]:
    """Stored answers, one for each question, in the order of the data.

    Args:
      path: lines of JSON with `id` and `answer`; or what another harness stored of the same data:
        lmms-eval's samples, or VLMEvalKit's predictions as TSV.
    Raises:
      DataError: lines that are not such; answers to other data; a question without an answer or
        with two.
    """
    path = files.resolve(path)
    if not path.exists():
        raise DataError(f"--answers: expected a file of answers; there is no {path}")
    if path.suffix == ".xlsx":
        raise DataError(
            f"--answers: expected JSON lines or a TSV file; got {path.name}: run VLMEvalKit with "
            "PRED_FORMAT=tsv"
        )
    by_id: dict[str, dict[str, Any]] = {}
    by_row: dict[int, list[Question]] = {}
    for question in data.questions:
        by_row.setdefault(question.row, []).append(question)
    lines = _vlmeval_answers if path.suffix == ".tsv" else _json_answers
    for line in lines(path, by_row):
        key = line["id"]
        if key in by_id:
            raise DataError(f"{path}: expected one answer to each question; got two to {key!r}")
        by_id[key] = line
    lost = [question.id for question in data.questions if question.id not in by_id]
    if lost:
        raise DataError(
            f"{path}: expected an answer to each of {len(data.questions)} questions; got none to "
            f"{lost[0]!r} ({len(lost)} such questions): use the file of this benchmark and data"
        )
    return [by_id[question.id] for question in data.questions]


def _json_answers(path: epath.Path, by_row: dict[int, list[Question]]) -> Iterator[dict[str, Any]]:
    """Lines of `answers.jsonl`, or of lmms-eval's samples, which number the rows of the data."""
    for number, text in enumerate(files.read_lines(path)):
        try:
            line = json.loads(text)
            if "doc_id" not in line:
                yield {**line, "id": str(line["id"]), "answer": line["answer"] + ""}
                continue
            answer = line["filtered_resps"]
            answer = (answer[0] if isinstance(answer, list) else answer) + ""
            target = str(line["target"])
            asked = by_row.get(line["doc_id"], [])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{path}: line {number}: expected JSON with the texts id and answer, or a sample "
                f"of lmms-eval; got {text[:80]!r}"
            ) from error
        for question in asked:
            golds = question.answer if isinstance(question.answer, tuple) else (question.answer,)
            if None not in golds and target.lower() not in [x.lower() for x in golds]:
                raise DataError(
                    f"{path}: line {number}: expected the data that were asked; got the answer "
                    f"{target!r}, and in --data {golds[0]!r}: name the same data, in their order"
                )
            yield {"id": question.id, "answer": answer}


def _vlmeval_answers(
    path: epath.Path, by_row: dict[int, list[Question]]
) -> Iterator[dict[str, Any]]:
    """Answers of VLMEvalKit's table, which has the rows of the data and `prediction`."""
    for number, row in enumerate(read.tsv(path, "index", "question", "prediction")):
        for question in by_row.get(number, []):
            if row["question"].strip() != question.text.strip():
                raise DataError(
                    f"{path}: row {number}: expected the data that were asked; got the question "
                    f"{row['question']!r:.80}, and in --data {question.text!r:.80}: name the same"
                )
            yield {"id": question.id, "answer": row["prediction"]}
