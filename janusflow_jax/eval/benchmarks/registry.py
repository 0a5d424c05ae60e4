"""The benchmarks: their data files, the settings of a run by default, and numbers to compare with.

No data is part of this package. docs/benchmarks.md says where the files are and what their licenses
allow.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from janusflow_jax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A data file, or a folder, that this project knows."""

    name: str
    rows: int  # 0: not checked
    digest: str = ""  # 'sha256:...' or 'md5:...'; '': none is known


@dataclasses.dataclass(frozen=True)
class Reported:
    """A score that somebody reported.

    `settings` has what is known of how it was measured. Names are those of the report's settings,
    where it has them: the report says which ones differ.
    """

    model: str
    score: str  # the name of the score in our report
    value: float
    source: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a run and its report need to know of a benchmark."""

    name: str
    kind: Literal["generate", "understand"]
    about: str
    files: tuple[DataFile, ...]
    scorer: str  # who computes the scores
    protocol: str  # the default; of understanding: the authors'
    published: tuple[Reported, ...] = ()  # by the paper
    third_party: tuple[Reported, ...] = ()
    # of generation
    prompts: int = 0
    images_per_prompt: int = 1
    layout: str = ""  # of `generate.image_file`
    guidance_scale: float = 2.0
    num_steps: int = 30

    @property
    def images(self) -> int:
        """Images of a whole run."""
        return self.prompts * self.images_per_prompt


def get(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      ConfigError: there is none.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            f"benchmark: expected one of {', '.join(BENCHMARKS)}; got {name!r}: choose one"
        )
    return BENCHMARKS[name]


PAPER = "JanusFlow, arXiv 2411.07975"
_TUMM = "TorchUMM, github.com/AIFrontierLab/TorchUMM, README"
_PR541 = "the authors of Janus in VLMEvalKit, pull request 541"
_JANUS = "Janus, arXiv 2410.13848"


def _flow(score: str, value: float, **settings: Any) -> Reported:
    """A value of the paper for its model of 1.3B parameters."""
    return Reported("JanusFlow", score, value, PAPER, settings)


def _tumm(score: str, value: float, model: str = "JanusFlow", **settings: Any) -> Reported:
    return Reported(model, score, value, _TUMM, settings)


_TUMM_IMAGES = {
    "protocol": "raw",
    "guidance_scale": 2.0,
    "num_steps": 30,
    "seed": 42,
    "images_per_prompt": 4,
}

_ALL = (
    Benchmark(
        name="geneval",
        kind="generate",
        about="553 prompts of objects, counts, colors and positions; an object detector judges",
        files=(
            DataFile(
                "evaluation_metadata.jsonl",
                553,
                "sha256:5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
        ),
        scorer="external: the official Mask2Former and CLIP; the summary is ours",
        protocol="raw",
        published=(
            _flow("GenEval", 63.0, image_size=384),
            _flow("GenEval", 70.0, image_size=256),
        ),
        third_party=(
            _tumm("GenEval", 49.99, **_TUMM_IMAGES),
            _tumm("GenEval", 78.92, "Janus-Pro-7B", protocol="raw"),
        ),
        prompts=553,
        images_per_prompt=4,
        layout="geneval",
    ),
    Benchmark(
        name="dpg",
        kind="generate",
        about="1,065 long prompts; mPLUG answers questions about each image",
        files=(
            DataFile(
                "prompts",
                1065,
                "sha256:b6706e0fce50657f42561a4a5948817aca5bfe616200a1e6c980f2876992266e",
            ),
        ),
        scorer="external: the official mPLUG-large; the aggregation is ours",
        protocol="raw",
        published=(
            _flow("DPG-Bench", 80.09, image_size=384),
            _flow("DPG-Bench", 81.23, image_size=256),
        ),
        third_party=(
            _tumm("DPG-Bench", 72.03, **_TUMM_IMAGES),
            _tumm("DPG-Bench", 83.73, "Janus-Pro-7B"),
        ),
        prompts=1065,
        images_per_prompt=4,
        layout="dpg",
    ),
    Benchmark(
        name="mjhq-fid30k",
        kind="generate",
        about="30,000 prompts of MJHQ-30K in 10 categories; FID and CLIP score",
        files=(DataFile("meta_data.json", 30_000),),
        scorer="ours, in JAX; the weights of Inception and CLIP come from you",
        protocol="raw",
        published=(
            _flow("fid_janus", 9.51, image_size=384, guidance_scale=2.0, num_steps=30),
            _flow("fid_janus", 12.70, image_size=256, guidance_scale=2.0, num_steps=30),
        ),
        prompts=30_000,
        layout="by_category",
    ),
    Benchmark(
        name="mjhq-fid10k",
        kind="generate",
        about="1,000 prompts of each category of MJHQ-30K: the paper's ablation, by our selection",
        files=(DataFile("meta_data.json", 30_000),),
        scorer="ours, in JAX; the weights of Inception and CLIP come from you",
        protocol="raw",
        prompts=10_000,
        layout="by_category",
        guidance_scale=7.5,
    ),
    Benchmark(
        name="geneval2",
        kind="generate",
        about="800 prompts of 3 to 10 atoms; Qwen3-VL judges",
        files=(DataFile("geneval2_data.jsonl", 800),),
        scorer="external: github.com/facebookresearch/GenEval2",
        protocol="raw",
        prompts=800,
        layout="flat",
    ),
    Benchmark(
        name="wise",
        kind="generate",
        about="1,000 prompts that need knowledge of the world; GPT-4o judges",
        files=(DataFile("data", 1000),),
        scorer="external: github.com/PKU-YuanGroup/WISE",
        protocol="raw",
        third_party=(_tumm("overall", 0.2964, judge="Qwen2.5-VL-72B"),),
        prompts=1000,
        layout="flat",
    ),
    Benchmark(
        name="pope",
        kind="understand",
        about="9,000 questions whether an object is in an image of COCO, in three splits",
        files=(
            DataFile("POPE.tsv", 0, "md5:c12f5acb142f2ef1f85a26ba2fbe41d5"),
            DataFile("coco_pope_random.json", 3000),
            DataFile("coco_pope_popular.json", 3000),
            DataFile("coco_pope_adversarial.json", 3000),
            DataFile("parquet", 9000),
        ),
        scorer="ours",
        protocol="janus",
        published=(_flow("f1_random", 88.0),),
        third_party=(
            Reported("Janus", "f1_overall", 85.5, _PR541, {"system": ""}),
            Reported("Janus", "f1_random", 87.1, _PR541, {"system": ""}),
            Reported("Janus", "f1_random", 87.0, _JANUS),
        ),
    ),
    Benchmark(
        name="mme",
        kind="understand",
        about="1,187 pairs of yes-or-no questions in 14 tasks",
        files=(
            DataFile("MME.tsv", 2374, "md5:b36b43c3f09801f5d368627fb92187c3"),
            DataFile("MME_Benchmark_release_version", 2374),
            DataFile("parquet", 2374),
        ),
        scorer="ours",
        protocol="janus",
        published=(_flow("perception", 1333.1),),
        third_party=(
            _tumm("perception", 1305.6),
            _tumm("cognition", 251.1),
            Reported("Janus", "perception", 1342.4, _PR541, {"system": ""}),
            Reported("Janus", "perception", 1338.0, _JANUS),
        ),
    ),
    Benchmark(
        name="mmbench-dev-en",
        kind="understand",
        about="4,329 rows: 1,164 questions of choice in all rotations of their options",
        files=(
            DataFile("MMBench_DEV_EN.tsv", 4329, "md5:b6caf1133a01c6bb705cf753bb527ed8"),
            DataFile("mmbench_dev_20230712.tsv", 4377),
            DataFile("parquet", 4329),
        ),
        scorer="ours",
        protocol="janus",
        published=(
            _flow("vanilla_all", 74.9, image_size=384),
            _flow("vanilla_all", 71.9, image_size=256),
        ),
        third_party=(
            Reported("Janus", "vanilla_all", 69.8, _PR541, {"system": ""}),
            Reported("Janus", "vanilla_all", 69.4, _JANUS),
            _tumm(
                "circular",
                64.9,
                data="MMBench_TEST_EN_V11",
                protocol="vlmevalkit-system",
                judge="Qwen3-32B",
            ),
        ),
    ),
    Benchmark(
        name="seed-image",
        kind="understand",
        about="the image part of SEED-Bench: about 14,200 questions of choice",
        files=(
            DataFile("SEEDBench_IMG.tsv", 0, "md5:68017231464752261a2526d6ca3a10c0"),
            DataFile("SEED-Bench.json", 0),
            DataFile("parquet", 0),
        ),
        scorer="ours",
        protocol="janus",
        published=(_flow("accuracy", 70.5),),
        third_party=(
            Reported("Janus", "accuracy", 63.8, _PR541, {"system": ""}),
            Reported("Janus", "accuracy", 63.7, _JANUS),
        ),
    ),
    Benchmark(
        name="vqav2-val",
        kind="understand",
        about="214,354 questions with ten answers each",
        files=(
            DataFile("v2_OpenEnded_mscoco_val2014_questions.json", 214_354),
            DataFile("parquet", 214_354),
        ),
        scorer="ours",
        protocol="janus",
    ),
    Benchmark(
        name="vqav2-testdev",
        kind="understand",
        about="447,793 questions of test2015, whose answers only EvalAI has",
        files=(
            DataFile("v2_OpenEnded_mscoco_test2015_questions.json", 447_793),
            DataFile("parquet", 0),
        ),
        scorer="external: EvalAI, challenge 830; we write its file",
        protocol="janus",
        published=(_flow("accuracy", 79.8, split="test"),),
    ),
    Benchmark(
        name="gqa",
        kind="understand",
        about="12,578 questions of testdev_balanced on 398 images",
        files=(
            DataFile("testdev_balanced_questions.json", 12_578),
            DataFile("GQA_TestDev_Balanced.tsv", 12_578, "md5:99b62f22e224d9b2f32dcbe41359d1c9"),
            DataFile("parquet", 12_578),
        ),
        scorer="ours",
        protocol="janus",
        published=(_flow("accuracy", 60.3),),
    ),
    Benchmark(
        name="mmmu-val",
        kind="understand",
        about="900 questions of college exams in 30 subjects: 847 of choice, 53 open",
        files=(
            DataFile("MMMU_DEV_VAL.tsv", 1050, "md5:585e8ad75e73f75dcad265dfd0417d64"),
            DataFile("parquet", 900),
        ),
        scorer="ours",
        protocol="janus",
        published=(_flow("accuracy", 29.3),),
        third_party=(
            _tumm("accuracy", 29.0),
            Reported("Janus", "accuracy", 31.2, _PR541, {"system": ""}),
            Reported("Janus", "accuracy", 30.5, _JANUS),
        ),
    ),
    Benchmark(
        name="mmvet",
        kind="understand",
        about="218 questions with free answers; GPT-4 grades",
        files=(DataFile("mm-vet.json", 218), DataFile("MMVet.tsv", 218), DataFile("parquet", 218)),
        scorer="external: the official GPT-4 grader; we write its file",
        protocol="janus",
        published=(_flow("overall", 30.9),),
        third_party=(
            _tumm("overall", 31.8),
            Reported("Janus", "overall", 36.8, _PR541),
            Reported("Janus", "overall", 34.3, _JANUS),
        ),
    ),
)

BENCHMARKS = {x.name: x for x in _ALL}
"""Name -> benchmark."""
