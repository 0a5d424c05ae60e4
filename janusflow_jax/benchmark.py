"""Runs a benchmark:
`python -m janusflow_jax.benchmark pope --model M --data POPE.tsv --out runs/pope`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals("the same command resumes")

import argparse
import time
from typing import Any

import jax
from etils import epath

from janusflow_jax import cli, pipeline
from janusflow_jax.config import files
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.eval import clip as clip_lib, inception as inception_lib, provenance
from janusflow_jax.eval.benchmarks import (
    answer,
    generate,
    image_scores,
    plan,
    prompts as prompts_lib,
    read,
    registry,
    report,
)
from janusflow_jax.parallel import numerics
from janusflow_jax.sampling import inputs

LOG_EVERY = 10.0  # seconds
DESCRIPTION = "Runs a benchmark: generates its images or answers its questions, and scores them."
EPILOG = """\
examples:
  what there is:   --list
  understanding:   pope --model M --data POPE.tsv --out runs/pope
  GenEval:         geneval --model M --data evaluation_metadata.jsonl --out runs/geneval
                   (then the official scorer on runs/geneval/images)
                   geneval --out runs/geneval --results results.jsonl
  FID and CLIP:    mjhq-fid30k --model M --data MJHQ-30K --out runs/mjhq --inception I --clip C
  four processes:  the same command with --shard 0/4, ..., --shard 3/4, one on each device

An interrupted run resumes with the same command, to the same bits with any number of processes. A
run with other settings needs another --out. docs/benchmarks.md says where the data are, how the
external scorers run, and which numbers compare."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("benchmark", DESCRIPTION, EPILOG, needs_model=False)
    p.add_argument("name", nargs="?", default="", help="of the benchmark")
    p.add_argument("--list", action="store_true", help="list the benchmarks")
    p.add_argument("--data", default="", help="the benchmark's data: a file or a folder")
    p.add_argument("--out", default="", help="the folder of the run")
    p.add_argument(
        "--stage",
        choices=("run", "score"),
        default="",
        help="run: only the model; score: only the scores, without the model; default: both",
    )
    p.add_argument("--protocol", default="", help="of the prompts; default: the benchmark's")
    p.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only N prompts or questions: a test"
    )
    p.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="B",
        help="rows that a program computes; default 16",
    )
    p.add_argument(
        "--shard",
        default="",
        metavar="K/N",
        help="this is process K, from 0, of N; default: JAX_PROCESS_ID and JAX_NUM_PROCESSES, or "
        "Slurm's variables, or one process",
    )
    generation = p.add_argument_group("generation")
    generation.add_argument(
        "--guidance-scale", type=float, metavar="W", help="default: the benchmark's"
    )
    cli.add_solver_options(generation)
    generation.add_argument("--seed", type=int, default=0, help="of the first image")
    generation.add_argument(
        "--results",
        default="",
        metavar="FILE",
        help="of the external scorer: GenEval's results.jsonl, DPG-Bench's ..._detail.txt",
    )
    generation.add_argument(
        "--questions", default="", metavar="FILE", help="DPG-Bench's dpg_bench.csv"
    )
    generation.add_argument(
        "--inception", default="", help="FID: a folder of tools/convert_scorer.py"
    )
    generation.add_argument("--clip", default="", help="CLIP score: the folder of a CLIP model")
    generation.add_argument(
        "--references", default="", help="FID: the folder mjhq30k_imgs; default: that in --data"
    )
    understanding = p.add_argument_group("understanding")
    understanding.add_argument(
        "--answers",
        default="",
        metavar="FILE",
        help="score these answers, without a model: of a run, lmms-eval or VLMEvalKit (TSV)",
    )
    understanding.add_argument(
        "--images", default="", help="a folder of image files; default: that of --data"
    )
    understanding.add_argument("--max-new-tokens", type=int, default=2048, metavar="N")
    understanding.add_argument(
        "--pixels",
        choices=read.PIXELS,
        default="published",
        help="how images become RGB: as in the authors' code, as in VLMEvalKit, or as in `chat`",
    )
    args = p.parse_args(argv)
    groups = {"generate": generation, "understand": understanding}
    args.changed = {  # kind -> options of that kind alone which were given
        kind: [
            x.option_strings[0] for x in group._group_actions if getattr(args, x.dest) != x.default
        ]
        for kind, group in groups.items()
    }
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        print(listing())
        return
    if not args.name or not args.out:
        raise ConfigError("expected the name of a benchmark and --out: see --list and --help")
    benchmark = registry.get(args.name)
    other = "understand" if benchmark.kind == "generate" else "generate"
    if unread := args.changed[other]:
        raise ConfigError(
            f"{', '.join(unread)}: {benchmark.name} does not read them: leave them out"
        )
    out = files.resolve(args.out)
    if benchmark.kind == "understand":
        answer_questions(args, benchmark, out)
        return
    if args.stage != "score" and not args.results:
        complete = generate_images(args, benchmark, out)
        if args.stage == "run" or not complete:
            return
    score_images(args, benchmark, out)


def listing() -> str:
    """A line for each benchmark."""
    lines = []
    for x in registry.BENCHMARKS.values():
        what = f"{x.images:,} images" if x.kind == "generate" else "answers"
        lines.append(f"{x.name:15} {what:14} {x.about}\n{'':30} scorer: {x.scorer}")
    return "\n".join(lines)


def load_model(args: argparse.Namespace) -> tuple[pipeline.Pipeline, dict[str, Any]]:
    """The model, and what results depend on beside the benchmark and its options."""
    # A run resumes with the checkpoint that it began with, or not at all.
    folder = provenance.resolve(args.model)
    sums = provenance.of(folder, args.adapter)
    args.model = str(folder)
    model = cli.load(args)
    return model, {
        "image_size": model.cfg.image_size,
        "batch": args.batch,
        "model": sums,
        "weights": args.weights,
        "dtype": model.dtype,
        "int8": args.int8,
        "device": jax.devices()[0].device_kind,
        "software": provenance.software(),
        "numerics": numerics.described(),
    }


def generate_images(
    args: argparse.Namespace, benchmark: registry.Benchmark, out: epath.Path
) -> bool:
    """Generates the images of this process; whether those of all processes are there."""
    if not args.model or not args.data:
        raise ConfigError(f"{benchmark.name}: expected --model and --data to generate images")
    if args.protocol not in ("", benchmark.protocol):
        raise ConfigError(
            f"--protocol: expected {benchmark.protocol!r} for {benchmark.name}; got "
            f"{args.protocol!r}"
        )
    guidance = benchmark.guidance_scale if args.guidance_scale is None else args.guidance_scale
    solver = cli.solver_options(args)
    generate.check_batch_size(benchmark, args.batch)
    prompts, data = prompts_lib.read(benchmark.name, args.data, args.limit)
    count = benchmark.images_per_prompt
    texts = [p.text for p in prompts]
    inputs.check_generate(texts, count, guidance_scale=guidance, **solver)
    inputs.image_seeds(args.seed, data["rows"], count)
    shard = plan.shard(args.shard)
    extractor = image_scores.extractor(*scorers(args))
    model, model_settings = load_model(args)
    student = model.cfg.student
    if student.steps and args.guidance_scale is None:
        guidance = None
    sampler, guidance = inputs.check_generate(
        texts, count, guidance_scale=guidance, student=student, **solver
    )
    solver["num_steps"] = sampler.steps
    settings = {
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        "data": data,
        "limit": args.limit,
        "images": len(prompts) * count,
        "images_per_prompt": count,
        "guidance_scale": guidance,
        **solver,
        "seed": args.seed,
        **model_settings,
    }
    began = time.time()
    for done, total in generate.run(benchmark, prompts, model, out, settings, shard, extractor):
        cli.log(f"{done} of {total} images, {time.time() - began:.1f} s")
    every = sum(len(x["images"]) for x in plan.read_marks(out / generate.MANIFEST).values())
    if every < settings["images"]:
        cli.log(f"{every} of the {settings['images']} images of all processes are there")
    return every == settings["images"]


def scorers(
    args: argparse.Namespace,
) -> tuple[inception_lib.LoadedInception | None, clip_lib.LoadedClip | None]:
    """The networks of FID and of CLIP score that the options name."""
    return (
        inception_lib.load(args.inception) if args.inception else None,
        clip_lib.load(args.clip) if args.clip else None,
    )


def score_images(args: argparse.Namespace, benchmark: registry.Benchmark, out: epath.Path) -> None:
    """Writes the report of a complete run, or prints what an external scorer needs."""
    settings, images = generate.read(out)
    if settings["benchmark"] != benchmark.name:
        raise ConfigError(f"--out: expected a run of {benchmark.name}; got {settings['benchmark']}")
    if args.results and benchmark.name not in ("geneval", "dpg"):
        raise ConfigError(f"--results: expected geneval or dpg; got {benchmark.name}: leave it out")
    if benchmark.name == "geneval" and args.results:
        result = image_scores.geneval(benchmark, settings, images, args.results)
    elif benchmark.name == "dpg" and args.results:
        if not args.questions:
            raise ConfigError(
                "--questions: expected DPG-Bench's dpg_bench.csv; got nothing: add it"
            )
        result = image_scores.dpg(benchmark, settings, images, args.results, args.questions)
    elif benchmark.name.startswith("mjhq") and (args.inception or args.clip):
        data = files.resolve(args.data)  # the folder, or meta_data.json in it
        folder = data if data.is_dir() else data.parent
        references = args.references or str(folder / "mjhq30k_imgs")
        result = image_scores.mjhq(benchmark, settings, images, out, references, *scorers(args))
    else:
        if benchmark.name == "geneval2":
            print(image_scores.write_image_paths(out, images))
        print(f"{out / generate.IMAGES}: not scored yet; the scorer is {benchmark.scorer}")
        return
    table = report.write(
        out,
        benchmark,
        result.scores,
        counts=result.counts,
        settings=settings,
        data={
            "file": benchmark.files[0].name,
            **settings["data"],
            "known": image_scores.known_data(benchmark, settings),
        },
        scorer={"name": benchmark.scorer, **result.scorer},
        categories=result.categories,
        warnings=result.warnings,
    )
    print(table)


def answer_questions(
    args: argparse.Namespace, benchmark: registry.Benchmark, out: epath.Path
) -> None:
    """Answers the questions of this process, and scores the answers of all once they are there."""
    if not args.data:
        raise ConfigError(f"{benchmark.name}: expected --data, the questions; got nothing")
    data = read.read(benchmark, args.data, args.images, args.limit)
    if args.answers:
        lines = answer.read_answers(args.answers, data)
        settings = {"answers": args.answers, "protocol": "of the answers", "limit": args.limit}
    else:
        if args.stage != "score":
            run_model(args, benchmark, data, out)
        if args.stage == "run":
            return
        settings = plan.read_settings(out / answer.MANIFEST)
        if settings["benchmark"] != benchmark.name or settings["data"] != _identity(data):
            raise ConfigError(
                f"--data: expected the data of the run in {out} ({settings['benchmark']}); got "
                f"other data ({benchmark.name}): use the same"
            )
        lines = answer.collect(benchmark.name, data, out)
        if lines is None:
            cli.log(f"{out}: other processes have not answered all of their questions yet")
            return
    print(score_answers(benchmark, data, lines, settings, out))


def run_model(
    args: argparse.Namespace, benchmark: registry.Benchmark, data: read.Data, out: epath.Path
) -> None:
    """Answers the questions of this process that are not answered yet."""
    if not args.model:
        raise ConfigError(f"{benchmark.name}: expected --model to answer questions; got nothing")
    answer.check_batch_size(args.batch)
    inputs.check_chat(args.max_new_tokens, 0.0, 1.0, 0)
    protocol = args.protocol or benchmark.protocol
    system = answer.request(benchmark.name, data.questions[0], protocol).system
    shard = plan.shard(args.shard)
    model, model_settings = load_model(args)
    if model.text is None:
        raise ConfigError(f"--model: expected a language model in it; got {args.model} without one")
    settings = {
        "benchmark": benchmark.name,
        "protocol": protocol,
        "system": system,
        "pixels": args.pixels,
        "max_new_tokens": args.max_new_tokens,
        "data": _identity(data),
        "limit": args.limit,
        "tokenizer": {"sha256": model.text.hash, "bos": model.text.add_bos},
        **model_settings,
    }
    began = last = time.time()
    for done, total in answer.run(benchmark.name, data, model, out, settings, shard):
        if done == total or time.time() - last > LOG_EVERY:
            last = time.time()
            cli.log(f"{done} of {total} questions, {last - began:.1f} s")


def _identity(data: read.Data) -> dict[str, Any]:
    """What the answers depend on; a file may be renamed."""
    return {"sha256": data.about["sha256"], "questions": len(data.questions)}


def score_answers(
    benchmark: registry.Benchmark,
    data: read.Data,
    lines: list[dict[str, Any]],
    settings: dict[str, Any],
    out: epath.Path,
) -> str:
    """Writes the report, or the file of an external scorer; the table."""
    answers = [line["answer"] for line in lines]
    file = report.submission(benchmark.name, data.questions, answers, out)
    scored = report.score(benchmark.name, data.questions, answers)
    first, *others = scored.rules or {"": {}}
    limit = settings.get("limit", 0)
    cut = limit and len(answers) >= limit
    counts = {
        "asked": len(answers),
        "expected": max(data.about["rows"], limit + 1) if cut else 0,
        "unparsed": len(scored.unparsed),
        "truncated": sum(bool(line.get("truncated")) for line in lines),
        "images": len({key for question in data.questions for key in question.images}),
    }
    warnings = report.unparsed_warnings(scored, answers)
    if file:
        warnings.append(f"not scored yet: {file} is for {benchmark.scorer}")
    return report.write(
        out,
        benchmark,
        scored.rules.get(first, {}),
        counts=counts,
        settings=settings,
        data=data.about,
        scorer={"name": benchmark.scorer, "rule": first},
        categories=scored.categories,
        other_rules={rule: scored.rules[rule] for rule in others},
        warnings=warnings,
    )


if __name__ == "__main__":
    cli.run(main, rerun="the same command resumes")
