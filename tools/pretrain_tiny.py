"""Pretrains the quick start's SigLIP and LLM by captioning OpenMoji, and saves them as a start.

    python tools/pretrain_tiny.py --data data/openmoji --out starts/emoji_llm

Real runs start from SigLIP and an LLM that others trained. At this size nobody has any, so this
tool makes them with the project's own train step: understanding rows only, next-token loss on the
captions, everything between pixels and words trained. The result is a model folder with the parts
llm, und_encoder, und_aligner and und_begin (bfloat16) and the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
from etils import epath

from janusflow_jax import checkpoint, pipeline, samples, train
from janusflow_jax import config as c
from janusflow_jax.data import chat_format, openmoji_build, train_tokenizer

PARTS = ("llm", "und_encoder", "und_aligner", "und_begin")


def make_config(args: argparse.Namespace, hub: str) -> c.TrainConfig:
    """The understanding-only run. Fresh parts are the point of it, hence `allow_fresh`."""
    source = c.SourceConfig(name="describe", path=args.data, task="understand", format="plain")
    return c.TrainConfig(
        name="pretrain_tiny",
        workdir=args.workdir,
        model=c.model_config("emoji"),
        data=c.DataConfig(sources=(source,), row_len=160, gen_slots=0, und_slots=6, seed=args.seed),
        optim=c.OptimConfig(
            name="muon",
            lr=args.lr,
            warmup_steps=50,
            decay_steps=args.steps // 2,
            ema=0.995,
            weight_decay=0.05,
        ),
        loss=c.LossConfig(rf_weight=0.0, repa_weight=0.0),
        tokenizer=hub,
        allow_fresh=True,
        train_parts=PARTS,
        batch_rows=args.batch_rows,
        num_steps=args.steps,
        seed=args.seed,
        remat=False,
        log_every_steps=50,
        save_every_steps=1000,
    )


def make_tokenizer(out: str) -> None:
    """Trains the tokenizer on the captions and the fixed words of the chat, into `out`."""
    model = c.model_config("emoji")
    train_tokenizer.train_tokenizer(
        openmoji_build.tokenizer_texts(),
        model.llm.vocab_size,
        out,
        model.num_image_tokens,
        model.image_size,
    )


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--out", default="starts/emoji_llm")
    p.add_argument("--workdir", default="runs/pretrain_tiny")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch-rows", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true")
    args = p.parse_args(argv)
    began = time.time()
    hub = epath.Path(args.workdir).resolve() / "tokenizer"
    if not (hub / "tokenizer.json").exists():
        make_tokenizer(str(hub))
    cfg = make_config(args, str(hub))
    workdir = train.train(cfg)
    loaded = checkpoint.load_model(workdir, weights="ema")
    chat = chat_format.ChatFormat.load(str(hub))
    model = pipeline.JanusFlowPipeline(cfg.model, loaded.params, {}, chat)
    scores = {}
    for split in ("heldout_pairs", "heldout_views"):
        source = c.SourceConfig(name=split, path=args.data, split=split)
        lines = samples.caption_source(model, source, 200)
        scores[split] = sum(x["answer"] in x["captions"] for x in lines) / len(lines)
        print(f"{split}: {scores[split]:.3f} of captions exact (200 pictures)")
    parts = {
        n: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), loaded.params[n]) for n in PARTS
    }
    extra = {"made_by": "tools/pretrain_tiny.py", "exact_captions": scores, "steps": args.steps}
    checkpoint.save_model(
        args.out,
        model_cfg=cfg.model,
        params=parts,
        vae=None,
        hub_files=hub,
        extra=extra,
        overwrite=args.overwrite,
    )
    options = f"--steps {args.steps} --batch-rows {args.batch_rows} --lr {args.lr}"
    command = f"python tools/pretrain_tiny.py {options} --out starts/emoji_llm"
    notice = openmoji_build.START_NOTICE.format(
        title="The quick start's SigLIP and language model", command=command
    )
    (epath.Path(args.out) / "README.md").write_text(notice)
    print(json.dumps(extra), f"{(time.time() - began) / 60:.1f} min, saved to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (c.ConfigError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
