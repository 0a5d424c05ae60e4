"""Pretrains the quick start's SigLIP and LLM by captioning OpenMoji and saves them for `starts/`.

    python tools/prepare_openmoji.py --views 24 --out data/openmoji_24
    python experiments/starts/pretrain_tiny.py --data data/openmoji_24 --out starts/emoji_llm

Real runs start from a published SigLIP and LLM. None exist at this size, so this script trains
them with the project's own train step: understanding rows only, next-token loss on the captions,
all parts between pixels and words trained. SigLIP needs many more images than the LLM needs
captions. So a first run trains it with a much smaller LLM, five times as fast; a second run trains
both with the quick start's LLM. Both see 24 views of each training pair, because three are soon
known by heart. The result is a model folder with the parts llm, und_encoder, und_aligner and
und_begin (bfloat16), and the tokenizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.starts import notice, tokenizer
from janusflow_jax import cli, config as c, pipeline, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import files
from janusflow_jax.data import chat_format
from janusflow_jax.eval import previews

PARTS = ("llm", "und_encoder", "und_aligner", "und_begin")


def small_llm_config() -> c.ModelConfig:
    """The quick start's SigLIP with a language model of an eleventh of the parameters."""
    model = c.model_config("emoji")
    model.name = "emoji-small-llm"
    model.llm = dataclasses.replace(
        model.llm, width=64, mlp_width=176, num_layers=2, num_heads=2, num_kv_heads=2
    )
    model.repa = dataclasses.replace(model.repa, layer=1)
    return model


def make_config(
    args: argparse.Namespace, hub: str, name: str, model: c.ModelConfig, form: str, steps: int
) -> c.TrainConfig:
    """An understanding-only run. All parts are fresh, hence `allow_fresh`."""
    source = c.SourceConfig(name="describe", path=args.data, task="understand", format=form)
    row_len, slots = {"plain": (144, 4), "chat": (160, 2)}[form]  # whole samples, little padding
    return c.TrainConfig(
        name=name,
        workdir=f"{args.workdir}/{name}",
        model=model,
        data=c.DataConfig(
            sources=(source,), row_len=row_len, gen_slots=0, und_slots=slots, seed=args.seed
        ),
        optim=c.OptimConfig(
            name="muon",
            lr=args.lr,
            warmup_steps=50,
            decay_steps=steps // 2,
            ema=0.995,
            weight_decay=0.05,
        ),
        loss=c.LossConfig(rf_weight=0.0, repa_weight=0.0),
        tokenizer=hub,
        allow_fresh=True,
        train_parts=PARTS,
        batch_rows=args.batch_rows,
        num_steps=steps,
        seed=args.seed,
        remat="none",
        scan_layers=False,
        matmul_precision="BF16_BF16_F32",
        log_every_steps=50,
        save_every_steps=1000,
    )


def run(cfg: c.TrainConfig) -> str:
    """Trains to the last step and returns the workdir; exits if the run was stopped."""
    workdir = train.train(cfg)
    if model_folder.committed_steps(workdir)[-1] < cfg.num_steps:
        sys.exit("stopped before the last step: run the same command again to resume")
    return workdir


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="data/openmoji_24")
    p.add_argument("--out", default="starts/emoji_llm")
    p.add_argument("--workdir", default="runs/pretrain_tiny")
    p.add_argument("--encoder-steps", type=int, default=6000, help="with the small LLM")
    p.add_argument("--steps", type=int, default=2000, help="with the quick start's LLM")
    p.add_argument("--batch-rows", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this command wrote"
    )
    args = p.parse_args(argv)
    began = time.time()
    model_folder.check_out(args.out, args.overwrite, [args.data], made=[notice.FILE])
    hub = files.resolve(args.workdir) / "tokenizer"
    if not (hub / "tokenizer.json").exists():
        model = c.model_config("emoji")
        tokenizer.train_tokenizer(
            hub, model.llm.vocab_size, model.num_image_tokens, model.image_size
        )
    small = make_config(args, str(hub), "encoder", small_llm_config(), "plain", args.encoder_steps)
    first = run(small)
    cfg = make_config(args, str(hub), "llm", c.model_config("emoji"), "chat", args.steps)
    cfg.init = (("und_encoder", first),)
    workdir = run(cfg)
    loaded = model_folder.load_model(workdir, weights="ema")
    chat = chat_format.ChatFormat.load(str(hub))
    parts = {
        name: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
        for name, tree in (loaded.params or {}).items()
        if name in PARTS
    }
    model = pipeline.Pipeline(cfg.model, loaded.params, {}, chat)
    scores = {}
    for split in ("heldout_pairs", "heldout_views"):
        source = c.SourceConfig(name=split, path=args.data, split=split)
        lines = previews.caption_source(model, source, 200)
        scores[split] = sum(x["answer"] in x["captions"] for x in lines) / len(lines)
        print(f"{split}: {scores[split]:.3f} of captions exact (200 images)")
    extra = {
        "made_by": "experiments/starts/pretrain_tiny.py",
        "exact_captions": scores,
        "steps": args.steps,
    }
    notice.remove(args.out)
    model_folder.save_model(
        args.out,
        model_cfg=cfg.model,
        params=parts,
        vae=None,
        hub_files=hub,
        extra=extra,
        overwrite=args.overwrite,
    )
    options = f"--data {args.data} --encoder-steps {args.encoder_steps} --steps {args.steps}"
    options += f" --batch-rows {args.batch_rows} --lr {args.lr}"
    command = f"python experiments/starts/pretrain_tiny.py {options} --out starts/emoji_llm"
    notice.write(args.out, "The quick start's SigLIP and language model", command)
    print(json.dumps(extra), f"{(time.time() - began) / 60:.1f} min, saved to {args.out}")


if __name__ == "__main__":
    cli.run(main)
