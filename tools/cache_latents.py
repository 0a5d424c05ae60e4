"""Computes what the frozen encoders make of a data set's pictures once, for every later epoch.

    python tools/cache_latents.py --data data/openmoji --model starts/emoji_vae starts/emoji_llm \\
        --out data/openmoji/cache --crops 2 --features

For a `generate` source: the VAE's posterior (mean and log-variance, so that training still samples)
of `--crops` random squares of each picture, and with `--features` the SigLIP features that REPA
aligns with. For an `understand` source (`--task understand`): the SigLIP features of the whole
pictures. A config names the folder as its source's `cache`.

Runs on all local devices. Several processes share the work: `--process 0 --num-processes 4` and so
on, each started by hand, or `--distributed` where jax.distributed knows how many there are (pods).
Run the same command again after it was stopped, also with another number of processes: what is
there is kept. `docs/data.md` has the sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from janusflow_jax import cli
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import cache as latent_cache, sources
from janusflow_jax.training import encode_cache


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", required=True, help="folder of the prepared data set")
    p.add_argument("--split", default="train")
    p.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="a field of the source's `fields` in the config",
    )
    p.add_argument("--task", default="generate", choices=("generate", "understand"))
    p.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="model folders or runs, as `start` and `init` of a config name them: each part comes\n"
        "from the first that has it",
    )
    p.add_argument("--out", required=True, help="folder of the cache")
    p.add_argument("--crops", type=int, default=1, help="of each picture; square ones have one")
    p.add_argument("--features", action="store_true", help="SigLIP's too, for REPA")
    p.add_argument("--dtype", default="bfloat16", choices=tuple(latent_cache.DTYPES))
    p.add_argument(
        "--compute-dtype",
        default="",
        choices=("", *latent_cache.DTYPES),
        help="of the encoders; default float32 on a CPU, bfloat16 elsewhere",
    )
    p.add_argument("--seed", type=int, default=0, help="of the crops")
    p.add_argument("--batch", type=int, default=8, help="pictures a device takes at a time")
    p.add_argument("--shard-records", type=int, default=1024, help="records of a shard")
    p.add_argument("--workers", type=int, default=8, help="threads that decode")
    p.add_argument("--process", type=int, default=0)
    p.add_argument("--num-processes", type=int, default=1)
    p.add_argument("--distributed", action="store_true", help="jax.distributed says who is who")
    args = p.parse_args(argv)
    if min(args.crops, args.batch, args.shard_records, args.workers) < 1:
        p.error("--crops, --batch, --shard-records and --workers: expected at least 1")
    if not 0 <= args.process < args.num_processes:
        p.error(
            f"--process: expected 0 to {args.num_processes - 1} (--num-processes); "
            f"got {args.process}"
        )
    if args.task == "understand" and args.crops != 1:
        p.error("--crops: expected 1 with --task understand (pictures are not cropped)")
    return args


def load_encoders(args: argparse.Namespace) -> encode_cache.Encoders:
    """The encoders that the cache needs, each from the first model that has it.

    Raises: CheckpointError, DataError: none has it, or the models are of different sizes.
    """
    loaded = [model_folder.load_model(path) for path in args.model]
    found: dict[str, Any] = {}
    for model in loaded:
        params = model.params or {}
        own = params.get("und_encoder") if model.cfg.und_encoder == "siglip" else None
        given = {"vae": model.vae, "siglip": params.get("repa_target", own)}
        found |= {n: (x, model.cfg) for n, x in given.items() if x is not None and n not in found}
    wanted = ["vae"] if args.task == "generate" else ["siglip"]
    wanted += ["siglip"] if args.features and args.task == "generate" else []
    lacks = [n for n in wanted if n not in found]
    if lacks:
        raise DataError(
            f"--model: expected folders with {' and '.join(wanted)}; "
            f"none of {args.model} has {' or '.join(lacks)}"
        )
    cfgs = {n: found[n][1] for n in wanted}
    sizes = {n: c.image_size for n, c in cfgs.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"--model: expected one picture size; got {sizes}")
    cfg = cfgs[wanted[0]]
    if "siglip" in cfgs:
        cfg = dataclasses.replace(cfg, und=cfgs["siglip"].und)
    trees = {n: found[n][0] if n in wanted else None for n in ("vae", "siglip")}
    return encode_cache.Encoders(cfg, **trees)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    began = time.time()
    if args.distributed:
        jax.distributed.initialize()
        args.process, args.num_processes = jax.process_index(), jax.process_count()
    devices = jax.local_devices()
    compute = args.compute_dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
    fields = tuple(tuple(pair.split("=", 1)) for pair in args.field)
    records = sources.mapped(sources.open_source(args.data, args.split), fields, "")
    encoders = load_encoders(args)
    manifest = encode_cache.plan(
        records,
        encoders,
        task=args.task,
        split=args.split,
        crops=args.crops,
        seed=args.seed,
        dtype=args.dtype,
        computed_in=compute,
        shard_records=args.shard_records,
    )
    size = manifest.bytes_per_entry
    print(
        f"process {args.process} of {args.num_processes}, {len(devices)} {devices[0].platform} "
        f"device(s): {len(records):,} records x {args.crops} crop(s) x {size / 1024:.1f} KiB = at "
        f"most {len(records) * args.crops * size / 2**30:.2f} GiB in {manifest.num_shards} shards "
        f"of {' and '.join(manifest.shapes)}",
        flush=True,
    )
    report = encode_cache.build(
        records,
        args.out,
        manifest,
        encode_cache.make_encode(encoders, manifest, devices),
        batch=args.batch * len(devices),
        process=args.process,
        num_processes=args.num_processes,
        workers=args.workers,
        say=lambda line: print(line, flush=True),
    )
    print(
        f"{args.out}: {report.shards} shards made, {report.skipped_shards} were there; "
        f"{report.pictures:,} crops encoded, {len(report.bad)} records bad, in "
        f"{time.time() - began:.1f} s"
    )
    for reason in sorted(set(report.bad))[:5]:
        print(f"  bad: {reason}")


if __name__ == "__main__":
    cli.run(main)
