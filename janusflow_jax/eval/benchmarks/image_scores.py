"""Scores of generated images: from the files of external scorers, and FID and CLIP score."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.eval import clip as clip_lib, fid, inception as inception_lib, provenance, stats
from janusflow_jax.eval.benchmarks import generate
from janusflow_jax.eval.benchmarks.prompts import json_lines
from janusflow_jax.eval.benchmarks.registry import Benchmark
from janusflow_jax.eval.scorers import dpg as dpg_rules, geneval as geneval_rules

SELF_CHECK = "self_check.json"
"""Beside the results of an external scorer: what it found on images that are known."""

REFERENCES = "fid_references"
"""Beside the folders of runs: statistics of reference images, which several runs share."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a report says of the scores of a run.

    `warnings` are the reasons why they are not the official ones. Without any, the first score has
    the benchmark's own name.
    """

    scores: Mapping[str, stats.Score | float]
    counts: dict[str, int]
    scorer: dict[str, Any]
    warnings: list[str]
    categories: Mapping[str, stats.Score | float] = dataclasses.field(default_factory=dict)


def known_data(benchmark: Benchmark, settings: dict[str, Any]) -> str:
    """The name of the official data, if a run has read them; else ''."""
    data, known = settings["data"], benchmark.files[0]
    same = known.digest in ("", f"sha256:{data['sha256']}") and data["rows"] == known.rows
    return known.name if same else ""


def deviations(
    benchmark: Benchmark, settings: dict[str, Any], images: Sequence[dict[str, Any]]
) -> list[str]:
    """How a run differs from the whole benchmark: its prompts, and images that are missing."""
    out = []
    if len(images) != benchmark.images:
        out.append(f"{len(images)} images; the whole benchmark has {benchmark.images}")
    if not known_data(benchmark, settings):
        out.append(f"the prompts are not those of the official {benchmark.files[0].name}")
    if missing := sum(image["file"] is None for image in images):
        out.append(f"{missing} images are missing, because they were non-finite")
    return out


def geneval(
    benchmark: Benchmark,
    settings: dict[str, Any],
    images: Sequence[dict[str, Any]],
    results: Any,
) -> Result:
    """GenEval from the official script's results.jsonl.

    Args:
      images: of `generate.read`.
    Raises:
      DataError: the file has images that are not of this run, the same image twice, or not all.
    """
    file = files.resolve(results)
    rows = {}
    _existing(file, "results.jsonl of the official GenEval")
    for row in json_lines(file, "filename", "correct", "tag", "prompt", "metadata"):
        key = "/".join(row["filename"].replace("\\", "/").split("/")[-3:])
        if key in rows:
            raise DataError(f"{file}: expected each image once; got {key} twice: score again")
        rows[key] = row
    expected = {x["file"]: x for x in images if x["file"]}
    for key, row in rows.items():
        if key not in expected or row["prompt"].strip() != expected[key]["prompt"]:
            raise DataError(
                f"{file}: expected results of this run; got {key} with the prompt "
                f"{row['prompt']!r:.80}, which is not in it: score its images/ folder"
            )
    if lacking := expected.keys() - rows.keys():
        raise DataError(
            f"{file}: expected results of {len(expected)} images; got {len(rows)}, without "
            f"{min(lacking)}: score the whole images/ folder"
        )
    ordered = [rows[key] for key in expected]
    scorer, warnings = _self_check(file, benchmark)
    warnings = deviations(benchmark, settings, images) + warnings
    if all("details" in row for row in ordered):
        if wrong := geneval_rules.contradictions(ordered):
            warnings.append(f"{len(wrong)} verdicts do not follow from their boxes: {wrong[0]}")
    counts = {
        "asked": len(images),
        "expected": benchmark.images,
        "missing": len(images) - len(rows),
    }
    scores = geneval_rules.summary(ordered)
    return Result(_named("GenEval", scores, warnings), counts, scorer, warnings)


def dpg(
    benchmark: Benchmark,
    settings: dict[str, Any],
    images: Sequence[dict[str, Any]],
    results: Any,
    questions: Any,
) -> Result:
    """DPG-Bench from the official script's ..._detail.txt and the official dpg_bench.csv.

    Raises:
      DataError: answers that are missing or not of this run, or tiles of another size.
    """
    file, table = files.resolve(results), files.resolve(questions)
    every = dpg_rules.read_questions(
        _existing(table, "DPG-Bench's dpg_bench.csv").read_bytes().decode()
    )
    ids = list(dict.fromkeys(x["id"] for x in images if x["file"]))
    if lacking := sorted({*ids} - every.keys()):
        raise DataError(f"{table}: expected questions for every prompt; got none for {lacking[0]}")
    own = {name: every[name] for name in ids}
    text = _existing(file, "the official script's ..._detail.txt").read_bytes().decode()
    answers = dpg_rules.read_detail(
        text, own, settings["image_size"], settings["images_per_prompt"]
    )
    scorer, warnings = _self_check(file, benchmark)
    warnings = deviations(benchmark, settings, images) + warnings
    counts = {
        "asked": len(images),
        "expected": benchmark.images,
        "missing": sum(x["file"] is None for x in images),
        "questions": sum(map(len, own.values())),
    }
    scores = dpg_rules.score(own, answers)
    categories = {name: value for name, value in scores.items() if name != "overall"}
    named = _named("DPG-Bench", {"overall": scores["overall"]}, warnings)
    return Result(named, counts, scorer, warnings, categories)


def extractor(
    inception: inception_lib.LoadedInception | None, clip: clip_lib.LoadedClip | None
) -> generate.Extractor | None:
    """What `mjhq` needs of images; None without a network."""
    if not inception and not clip:
        return None
    sums = [network.sha256 for network in (inception, clip) if network]
    name = hashlib.sha256(" ".join(sums).encode()).hexdigest()[:12]
    return generate.Extractor(name, fid.extractor(inception, clip))


def mjhq(
    benchmark: Benchmark,
    settings: dict[str, Any],
    images: Sequence[dict[str, Any]],
    out: epath.Path,
    references: Any,
    inception: inception_lib.LoadedInception | None,
    clip: clip_lib.LoadedClip | None,
) -> Result:
    """FID of the images from the reference images of the same prompts, and CLIP score.

    Args:
      references: the folder `mjhq30k_imgs`, with <category>/<id>.jpg.
      inception, clip: either may be None.
    """
    networks = extractor(inception, clip)
    if networks is None:
        raise ConfigError("expected --inception, --clip or both to score images; got neither")
    features = generate.read_features(out, networks, settings["batch"])
    there = [x for x in images if x["file"]]
    warnings = deviations(benchmark, settings, images)
    scores: dict[str, stats.Score | float] = {}
    scorer: dict[str, Any] = {}
    if inception:
        folder = files.resolve(references)
        sets = {"": sorted(x["file"].replace(".png", ".jpg") for x in there)}
        if benchmark.name == "mjhq-fid10k":
            every = (f"{x.parent.name}/{x.name}" for x in folder.glob("*/*.jpg"))
            sets["_of_all_references"] = sorted(every)
        for suffix, paths in sets.items():
            chosen = fid.references(folder, paths, inception, out.parent / REFERENCES)
            for name, value in fid.score(features, chosen).items():
                if name.startswith("fid_"):
                    scores[("" if inception.official else "other_") + name + suffix] = value
                else:
                    scorer[name + suffix] = value
        scorer |= {"inception_sha256": inception.sha256}
        if not inception.official:
            warnings.append("the weights of Inception are not FID's: the distances are not FID")
    if clip:
        result = clip_lib.score(clip, features["clip"], [x["prompt"] for x in there])
        scores["clip_score"] = result.pop("clip_score")
        scorer |= {"clip_sha256": clip.sha256, **result}
    counts = {
        "asked": len(images),
        "expected": benchmark.images,
        "missing": len(images) - len(there),
    }
    return Result(scores, counts, scorer, warnings)


def write_image_paths(out: epath.Path, images: Sequence[dict[str, Any]]) -> epath.Path:
    """The JSON file prompt -> image that GenEval 2's script reads."""
    file = out / "image_filepath_data.json"
    paths = {x["prompt"]: str(out / generate.IMAGES / x["file"]) for x in images if x["file"]}
    with files.replacing(file) as part:
        part.write_text(json.dumps(paths, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def _named(
    name: str, scores: dict[str, stats.Score], warnings: Sequence[str]
) -> dict[str, stats.Score]:
    """The scores, whose first has the official name if nothing speaks against it."""
    overall = scores.pop("overall")
    return {"overall" if warnings else name: overall, **scores}


def _self_check(results: epath.Path, benchmark: Benchmark) -> tuple[dict[str, Any], list[str]]:
    """What is known of the external scorer, and why its results may be wrong."""
    file = results.parent / SELF_CHECK
    known = {"results_sha256": provenance.sha256(results)}
    if not file.exists():
        return known, [f"no {SELF_CHECK} beside the results: the scorer itself was not checked"]
    check = checksums.read_json(file)
    known |= {"self_check": check}
    if check.get("benchmark") != benchmark.name or check.get("passed") is not True:
        return known, [f"the scorer did not pass its check: see {SELF_CHECK}"]
    return known, []


def _existing(file: epath.Path, what: str) -> epath.Path:
    if not file.exists():
        raise DataError(f"expected {what}; there is no {file}")
    return file
