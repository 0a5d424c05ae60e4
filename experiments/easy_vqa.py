"""easy-VQA in the forms of POPE, MMBench and VQAv2, and a model that learns to answer it.

    pip install --no-deps easy-vqa
    python experiments/easy_vqa.py --out data/easy_vqa
    python tools/prepare_data.py llava data/easy_vqa/train.json --images data/easy_vqa/train \\
        --out data/easy_vqa_train --tokenizer starts/emoji_llm/hub --heldout 0.02 \\
        --lengths understand:chat
    python -m janusflow_jax.train --config=experiments/easy_vqa.py

easy-VQA (PyPI `easy-vqa` 1.0, MIT) has 5,000 drawings of one shape at 64 px and 48,248 questions
with 13 answers. Here the train split becomes LLaVA conversations with the prompts that the
benchmarks ask. The test split becomes:

    pope.json     the 7,136 yes/no questions, as POPE's JSON lines
    mmbench.tsv   the 1,257 shape questions with 4 options, in 4 rotations each, as MMBench's
    vqav2/        all 9,673 questions, each with ten equal answers, as VQAv2's
    images/       its drawings under COCO's names (they stay PNG files)

docs/benchmarks.md has the commands that score the model.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import config as c

SHAPES = ("circle", "rectangle", "triangle", "star")
"""The options of shape questions; no drawing has a star."""
SHORT = "Answer the question using a single word or phrase."

Question = tuple[str, str, int]
"""Question, answer, number of the image."""


def get_config(arg: str | None = None) -> c.TrainConfig:
    """The quick start's model on easy-VQA: understanding only, without its generation parts."""
    c.parse_arg(arg, {})
    source = c.SourceConfig(name="answer", path="data/easy_vqa_train", task="understand")
    return c.TrainConfig(
        name="easy_vqa",
        model=c.model_config("emoji"),
        data=c.DataConfig(sources=(source,), row_len=512, gen_slots=0, und_slots=6),
        optim=c.OptimConfig(lr=1e-3, warmup_steps=50, decay_steps=400, ema=0.995),
        loss=c.LossConfig(repa_weight=0.0),
        start="starts/emoji_llm",
        init=(("vae", "starts/emoji_vae"),),
        train_parts=("und_encoder", "und_aligner", "llm"),
        batch_rows=4,
        num_steps=600,
        seed=1,
        remat="none",
        save_every_steps=200,
        evaluate=c.EvalConfig(
            sources=(dataclasses.replace(source, split="heldout"),), rows=16, every_steps=100
        ),
    )


def questions(data: Path, split: str) -> list[Question]:
    return [tuple(q) for q in json.loads((data / split / "questions.json").read_text())]


def image_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def llava(train: list[Question]) -> list[dict[str, Any]]:
    """A conversation for each question. The short system prompt keeps rows short."""
    return [
        {
            "id": f"{n}",
            "image": f"{image}.png",
            "conversations": [
                {"from": "system", "value": "Answer."},
                {"from": "human", "value": f"<image>\n{text}\n{SHORT}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for n, (text, answer, image) in enumerate(train)
    ]


def pope(test: list[Question]) -> list[dict[str, Any]]:
    asked = [q for q in test if q[1] in ("yes", "no")]
    return [
        {"question_id": i, "image": image_name(number), "text": text, "label": answer}
        for i, (text, answer, number) in enumerate(asked, 1)
    ]


def mmbench(test: list[Question], images: Path) -> list[dict[str, Any]]:
    """Shape questions. Rotation k of question i has index i + k x 1,000,000, as MMBench's."""
    shapes = [q for q in test if q[1] in SHAPES]
    rows = []
    for turn in range(len(SHAPES)):
        options = SHAPES[turn:] + SHAPES[:turn]
        for i, (text, answer, number) in enumerate(shapes, 1):
            image = base64.b64encode((images / image_name(number)).read_bytes()).decode()
            rows.append(
                {
                    "index": i + turn * 1_000_000,
                    "question": text,
                    "hint": "",
                    **dict(zip("ABCD", options, strict=True)),
                    "answer": "ABCD"[options.index(answer)],
                    "category": "shape",
                    "image": image,
                    "split": "dev",
                }
            )
    return rows


def vqa(test: list[Question]) -> tuple[dict[str, Any], dict[str, Any]]:
    asked = [
        {"question_id": i, "image_id": number, "question": text}
        for i, (text, _, number) in enumerate(test, 1)
    ]
    annotations = [
        {
            "question_id": i,
            "image_id": number,
            "question_type": text.split()[0],
            "answer_type": "yes/no" if answer in ("yes", "no") else "other",
            "multiple_choice_answer": answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)
            ],
        }
        for i, (text, answer, number) in enumerate(test, 1)
    ]
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    return {**head, "questions": asked}, {**head, "annotations": annotations}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder to make")
    p.add_argument(
        "--data", type=Path, help="easy_vqa/data; default: that of the installed package"
    )
    args = p.parse_args()
    data = args.data
    if data is None:
        # by its distribution: the module's name is also this script's
        try:
            package = importlib.metadata.distribution("easy-vqa")
        except importlib.metadata.PackageNotFoundError:
            sys.exit("easy-vqa: not installed: pip install --no-deps easy-vqa")
        data = Path(str(package.locate_file("easy_vqa/data")))
    test = questions(data, "test")
    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in sorted({number for _, _, number in test}):
        png = (data / "test" / "images" / f"{number}.png").read_bytes()
        (images / image_name(number)).write_bytes(png)
    asked, annotations = vqa(test)
    shutil.copytree(data / "train" / "images", args.out / "train", dirs_exist_ok=True)
    (args.out / "train.json").write_text(json.dumps(llava(questions(data, "train"))))
    (args.out / "pope.json").write_text("".join(json.dumps(x) + "\n" for x in pope(test)))
    (args.out / "vqav2").mkdir(exist_ok=True)
    (args.out / "vqav2" / "questions.json").write_text(json.dumps(asked))
    (args.out / "vqav2" / "annotations.json").write_text(json.dumps(annotations))
    rows = mmbench(test, images)
    with (args.out / "mmbench.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out}: {len(test):,} questions to test; now tools/prepare_data.py")


if __name__ == "__main__":
    main()
