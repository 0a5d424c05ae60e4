"""Computes the outputs of the frozen encoders once for a data set, so that training need not.

    python tools/cache_latents.py --data data/openmoji --model starts/emoji_vae starts/emoji_llm \\
        --out data/openmoji/cache --crops 2 --features

For a `generate` source: the VAE's posterior (mean and log-variance, so that training still samples)
of `--crops` random square crops of each image, and with `--features` the SigLIP features that REPA
aligns with. For an `understand` source (`--task understand`): the SigLIP features of whole images.
A config names the folder as `cache` of its source.

The tool uses all local devices. Several processes can share the work: start each by hand with
`--process 0 --num-processes 4` and so on, or use `--distributed` where jax.distributed knows the
processes (pods). Run the same command again to resume, also with another number of processes:
finished shards are kept. `docs/data.md` lists the sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals("run the same command again to resume")

import jax

from janusflow_jax import cli
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import files
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
        help="an entry of the source's `fields` in the config",
    )
    p.add_argument("--task", default="generate", choices=("generate", "understand"))
    p.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="model folders or runs, as in `start` and `init` of a config: each part comes from\n"
        "the first that has it",
    )
    p.add_argument("--out", required=True, help="folder of the cache")
    p.add_argument("--crops", type=int, default=1, help="crops of an image; square images have one")
    p.add_argument("--features", action="store_true", help="add SigLIP features, for REPA")
    p.add_argument("--dtype", default="bfloat16", choices=tuple(latent_cache.DTYPES))
    p.add_argument(
        "--compute-dtype",
        default="float32",
        choices=tuple(latent_cache.DTYPES),
        help="of the encoders; bfloat16 makes errors of the size of the posterior's deviation",
    )
    p.add_argument("--seed", type=int, default=0, help="of the crops")
    p.add_argument("--batch", type=int, default=8, help="images on each device at a time")
    p.add_argument("--shard-records", type=int, default=1024, help="records in each shard")
    p.add_argument("--workers", type=int, default=8, help="threads that decode images")
    p.add_argument("--process", type=int, default=0)
    p.add_argument("--num-processes", type=int, default=1)
    p.add_argument("--distributed", action="store_true", help="use jax.distributed")
    args = p.parse_args(argv)
    if min(args.crops, args.batch, args.shard_records, args.workers) < 1:
        p.error("--crops, --batch, --shard-records and --workers: expected at least 1")
    if not 0 <= args.process < args.num_processes:
        p.error(
            f"--process: expected 0 to {args.num_processes - 1} (--num-processes); "
            f"got {args.process}"
        )
    if args.task == "understand" and args.crops != 1:
        p.error("--crops: expected 1 with --task understand (images are not cropped)")
    return args


def load_encoders(args: argparse.Namespace) -> encode_cache.Encoders:
    """The encoders that the cache needs, each from the first model that has it.

    Raises:
      CheckpointError: a model cannot be loaded.
      DataError: no model has an encoder, or the models have different image sizes.
    """
    needed = {"vae"} if args.task == "generate" else {"siglip"}
    if args.features:
        needed.add("siglip")
    trees: dict[str, Any] = {}
    cfgs: dict[str, Any] = {}
    for model in map(model_folder.load_model, args.model):
        params = model.params or {}
        own = params.get("und_encoder") if model.cfg.und_encoder == "siglip" else None
        for name, tree in (("vae", model.vae), ("siglip", params.get("repa_target", own))):
            if name in needed and name not in trees and tree is not None:
                trees[name], cfgs[name] = tree, model.cfg
    if missing := needed - trees.keys():
        raise DataError(
            f"--model: expected folders with {' and '.join(sorted(needed))}; "
            f"none of {args.model} has {' or '.join(sorted(missing))}"
        )
    sizes = {n: c.image_size for n, c in cfgs.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"--model: expected one image size; got {sizes}")
    cfg = cfgs.get("vae") or cfgs["siglip"]
    if "siglip" in cfgs:
        cfg = dataclasses.replace(cfg, und=cfgs["siglip"].und)
    return encode_cache.Encoders(cfg, trees.get("vae"), trees.get("siglip"))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    began = time.time()
    for path in (args.data, *args.model, args.out):
        files.resolve(path)  # a bucket that cannot be opened ends the tool here
    if args.distributed:
        jax.distributed.initialize()
        args.process, args.num_processes = jax.process_index(), jax.process_count()
    devices = jax.local_devices()
    fields = sources.field_pairs(args.field)
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
        computed_in=args.compute_dtype,
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
        log=lambda line: print(line, flush=True),
    )
    print(
        f"{args.out}: {report.shards} shards written, {report.skipped_shards} existed; "
        f"{report.images:,} crops encoded, {len(report.bad)} bad records, in "
        f"{time.time() - began:.1f} s"
    )
    for reason in sorted(set(report.bad))[:5]:
        print(f"  bad: {reason}")


if __name__ == "__main__":
    cli.run(main)
