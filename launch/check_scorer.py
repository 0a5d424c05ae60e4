"""Checks an external scorer on images whose content is known, before it scores anything.

It runs inside the containers of score_geneval.Dockerfile and score_dpg.Dockerfile and imports
nothing of this project. The known images are the first of COCO val2017 with a large object of a
new class.

    python check_scorer.py geneval --coco COCO --out self_check.json
    python check_scorer.py dpg --coco COCO --out self_check.json --images DIR --resolution 384
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

NUM_KNOWN = 20
LARGE = 0.1
"""Share of the image that an object covers to be large."""
MIN_FOUND, MIN_ANSWERED = 0.9, 0.85
COLORS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 60, 220), "white": (255,) * 3}
DPG_FILES, DPG_LAST = 1065, "partiprompts97.png"
DETECTOR = pathlib.Path("/models/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth")
MPLUG = "damo/mplug_visual-question-answering_coco_large_en"


@dataclasses.dataclass(frozen=True)
class Known:
    """An image, the classes of its large objects, and a class that it does not show. Classes are
    numbers from 0 to 79 in the order of COCO."""

    file: str
    present: tuple[int, ...]
    absent: int


def known_images(annotations: dict[str, Any], count: int = NUM_KNOWN) -> list[Known]:
    """The first images, by id, with a large object of a class that no image before it shows so.

    Args: annotations: contents of instances_val2017.json.
    """
    order = sorted(x["id"] for x in annotations["categories"])
    images = {x["id"]: x for x in annotations["images"]}
    shown: dict[int, set[int]] = {}
    large: dict[int, set[int]] = {}
    for x in annotations["annotations"]:
        image, number = images[x["image_id"]], order.index(x["category_id"])
        shown.setdefault(image["id"], set()).add(number)
        if not x["iscrowd"] and x["area"] > LARGE * image["width"] * image["height"]:
            large.setdefault(image["id"], set()).add(number)
    out: list[Known] = []
    seen: set[int] = set()
    for key in sorted(large):
        if large[key] <= seen or len(out) == count:
            continue
        seen |= large[key]
        absent = next(n for n in range(len(order)) if n not in shown[key] and n not in seen)
        out.append(Known(images[key]["file_name"], tuple(sorted(large[key])), absent))
    return out


def check_geneval(
    known: Sequence[Known],
    detect: Callable[[str], set[int]],
    classify_color: Callable[[Image.Image], str],
) -> dict[str, Any]:
    """How many large objects the detector finds, and how it names flat colors."""
    objects = [(x.file, number) for x in known for number in x.present]
    detected = {x.file: detect(x.file) for x in known}
    missed = [f"{file}: class {number}" for file, number in objects if number not in detected[file]]
    colors = {name: classify_color(Image.new("RGB", (96, 96), rgb)) for name, rgb in COLORS.items()}
    enough = len(known) == NUM_KNOWN and len(objects) - len(missed) >= MIN_FOUND * len(objects)
    return {
        "passed": enough and all(name == got for name, got in colors.items()),
        "checks": {
            "images": len(known),
            "objects": len(objects),
            "missed": missed,
            "needed": MIN_FOUND,
            "colors": colors,
        },
    }


def check_dpg(known: Sequence[Known], ask: Callable[[str, int], str]) -> dict[str, Any]:
    """How many questions about what images show, and do not show, are answered rightly."""
    wrong = []
    for x in known:
        for number, right in ((x.present[0], "yes"), (x.absent, "no")):
            if (answer := ask(x.file, number)) != right:
                wrong.append(f"{x.file}: class {number}: {answer}")
    asked = 2 * len(known)
    enough = len(known) == NUM_KNOWN and asked - len(wrong) >= MIN_ANSWERED * asked
    checks = {"images": len(known), "wrong": wrong, "needed": MIN_ANSWERED}
    return {"passed": enough, "checks": checks}


def grid_problems(folder: pathlib.Path, resolution: int) -> list[str]:
    """Why the folder does not hold DPG-Bench's grids of four images of this side."""
    names = {x.name for x in folder.iterdir()}
    out = [] if len(names) == DPG_FILES else [f"expected {DPG_FILES} files; got {len(names)}"]
    if DPG_LAST not in names:
        out.append(f"expected {DPG_LAST}; got none")
    for name in sorted(names):
        try:
            with Image.open(folder / name) as image:
                size, form = image.size, image.format
        except OSError as error:
            out.append(f"{name}: {error}")
            continue
        if size != (2 * resolution, 2 * resolution) or form != "PNG":
            out.append(f"{name}: expected PNG of side {2 * resolution}; got {form} of {size}")
    return out


# --- the scorers themselves


def _geneval(coco: pathlib.Path, annotations: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, "/geneval/evaluation")
    import evaluate_images as official
    import mmcv
    import mmdet
    import numpy as np

    sys.argv = ["evaluate_images.py", "", "--model-path", str(DETECTOR.parent)]
    official.args = official.parse_args()
    official.object_detector, clip, official.classnames = official.load_models(official.args)
    official.clip_model, official.transform, official.tokenizer = clip
    official.THRESHOLD, official.COUNTING_THRESHOLD, official.MAX_OBJECTS = 0.3, 0.9, 16
    official.NMS_THRESHOLD, official.POSITION_THRESHOLD = 1.0, 0.1

    def detect(file: str) -> set[int]:
        metadata = {"tag": "single_object", "prompt": "", "include": []}
        result = official.evaluate_image(str(coco / "val2017" / file), metadata)
        return {official.classnames.index(name) for name in json.loads(result["details"])}

    def classify_color(image: Image.Image) -> str:
        box = np.array([0, 0, *image.size, 1.0])
        return official.color_classification(image, [(box, None)], "car")[0]

    version = f"af4902f, mmdet {mmdet.__version__}, mmcv {mmcv.__version__}"
    weights = hashlib.sha256(DETECTOR.read_bytes()).hexdigest()
    return check_geneval(known_images(annotations), detect, classify_color) | {
        "scorer": {"name": "GenEval", "version": version, "weights_sha256": weights}
    }


def _dpg(coco: pathlib.Path, annotations: dict[str, Any]) -> dict[str, Any]:
    import modelscope
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks

    model = pipeline(Tasks.visual_question_answering, model=MPLUG, device="gpu")
    names = [x["name"] for x in sorted(annotations["categories"], key=lambda x: x["id"])]

    def ask(file: str, number: int) -> str:
        image = Image.open(coco / "val2017" / file).convert("RGB")
        return model({"image": image, "question": f"Is there a {names[number]}?"})["text"]

    version = f"3c228f1, modelscope {modelscope.__version__}"
    return check_dpg(known_images(annotations), ask) | {
        "scorer": {"name": "DPG-Bench", "version": version, "weights": MPLUG}
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("benchmark", choices=("geneval", "dpg"))
    p.add_argument("--coco", type=pathlib.Path, required=True, help="annotations/ and val2017/")
    p.add_argument("--out", type=pathlib.Path, required=True, help="self_check.json")
    p.add_argument("--images", type=pathlib.Path, help="dpg: the grids")
    p.add_argument("--resolution", type=int, help="dpg: side of one image of a grid")
    args = p.parse_args(argv)
    if args.benchmark == "dpg" and (problems := grid_problems(args.images, args.resolution)):
        print(f"{args.images}: {problems[0]} ({len(problems)} problems)", file=sys.stderr)
        return 1
    annotations = json.loads((args.coco / "annotations/instances_val2017.json").read_text())
    check = {"geneval": _geneval, "dpg": _dpg}[args.benchmark]
    result = {"benchmark": args.benchmark, **check(args.coco, annotations)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
