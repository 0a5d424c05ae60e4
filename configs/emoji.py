"""The quick start: generate and understand OpenMoji drawings, trained on a laptop CPU.

The same code as a full-size run at small dimensions: 64 px, LLM 192 x 4. The objective is that of
pre-training (AR + RF + REPA), and so are the trained parts (all but SigLIP and the VAE).
Understanding and generation are mixed 25:75 by positions. The VAE, SigLIP and LLM start from the
weights in `starts/`.

    python tools/prepare_openmoji.py --out data/openmoji
    python -m janusflow_jax.train --config=configs/emoji.py

Arguments: `long` (half as many steps again), `test`, and one letter of the paper's ablations
(configs/ablation.py) with everything else equal; the default is F:

    A  without REPA
    B  one VAE + ConvNeXt encoder for both tasks
    C  a VAE + ConvNeXt encoder of its own for understanding; its VAE encoder is trained
    D  understanding only: as many images to understand as F, in 1,095 steps
    E  generation only: as many images to generate as F, in 3,405 steps

Cost and results: docs/quickstart.md; the letters: docs/small_scale.md.
"""

import dataclasses

from janusflow_jax import config as c
from janusflow_jax.config import stages

LETTERS = stages.ABLATIONS
ROWS = {"D": 0.2434, "E": 0.7566}  # share of F's rows that each task has


def get_config(arg: str | None = None) -> c.TrainConfig:
    names = c.parse_arg(
        arg,
        LETTERS
        | {
            "long": "half as many steps again",
            "test": "seconds: a tiny fresh model, for the tests",
        },
    )
    letters = sorted(names & set(LETTERS))
    if len(letters) > 1:
        raise c.ConfigError(f"configs/emoji.py: expected at most one letter; got {letters}")
    letter = letters[0] if letters else "F"
    understand = c.SourceConfig(
        name="describe", path=stages.OPENMOJI, task="understand", format="chat", weight=0.25
    )
    generate = c.SourceConfig(
        name="paint", path=stages.OPENMOJI, task="generate", format="chat", weight=0.75
    )
    heldout = tuple(
        dataclasses.replace(understand, name=split, split=split)
        for split in ("heldout_pairs", "heldout_views")
    )
    is_test = "test" in names
    # Outputs of the frozen encoders for the training images, by tools/prepare_openmoji.py.
    caches = [f"{stages.OPENMOJI}/cache/{task}" for task in ("understand", "generate")]
    if is_test or letter in "BC":
        caches[0] = ""
    if is_test:
        caches[1] = ""
    sources = tuple(
        dataclasses.replace(source, cache=cache)
        for source, cache in zip((understand, generate), caches, strict=True)
    )
    steps = round((6750 if "long" in names else 4500) * ROWS.get(letter, 1))
    cfg = c.TrainConfig(
        name="-".join(["emoji", *sorted(names)]),
        model=c.model_config("emoji"),
        data=c.DataConfig(sources=sources, row_len=160, gen_slots=5, und_slots=2),
        optim=c.OptimConfig(
            lr=3e-3, warmup_steps=50, decay_steps=steps - 50, weight_decay=0.1, ema=0.995
        ),
        # On drawings of flat color the first tenth of time decides the hue, and the last quarter
        # removes the noise inside fills. Logit-normal times fall into the two once in 70 and once
        # in 7; these, once in 5 and once in 7.
        loss=c.LossConfig(
            ar_weight=0.1,
            repa_weight=0.0 if letter in "AD" else 1.0,
            time="uniform",
            time_shift=2.0,
        ),
        init=(
            ("vae", "starts/emoji_vae"),
            ("und_encoder", "starts/emoji_llm"),
            ("llm", "starts/emoji_llm"),
        ),
        train_parts=tuple(p for p in c.MODEL_PARTS if p != "und_encoder"),
        batch_rows=8,
        num_steps=steps,
        seed=1,  # 0 made the weights in starts/, whose und_aligner a fresh one would resemble
        remat="none",
        scan_layers=False,
        matmul_precision="BF16_BF16_F32",
        log_every_steps=20,
        save_every_steps=500,
        sheet_every_steps=steps // 3,
        sheet_cfg_weight=2.0,
        prompts=stages.OPENMOJI_PROMPTS,
        heldout=heldout,
        evaluate=c.EvalConfig(
            sources=(
                dataclasses.replace(understand, name="describe_unseen", split="heldout_pairs"),
                dataclasses.replace(generate, name="paint_unseen", split="heldout_pairs"),
            ),
            rows=32,
            every_steps=steps // 6,
        ),
    )
    if is_test:
        cfg.model = c.model_config("test")
        cfg.init, cfg.allow_fresh, cfg.tokenizer = (), True, "starts/emoji_llm/hub"
        cfg.matmul_precision = ""  # the tests compare one device with several
        for source in cfg.data.sources:
            source.weight = 0.5  # few rows, and both tasks in each
        cfg.num_steps, cfg.batch_rows, cfg.log_every_steps, cfg.save_every_steps = 4, 8, 1, 2
        cfg.optim.warmup_steps, cfg.optim.decay_steps = 2, 0
        cfg.prompts, cfg.heldout_captions, cfg.sheet_num_steps = stages.OPENMOJI_PROMPTS[:2], 2, 2
        cfg.evaluate = c.EvalConfig()
    if letter in "BC":
        cfg.model.und_encoder = "shared" if letter == "B" else "own"
        cfg.model.repa_target = "siglip"
        cfg.init = tuple(
            ("repa_target" if part == "und_encoder" else part, path) for part, path in cfg.init
        )
    if letter == "C":
        cfg.train_parts = c.MODEL_PARTS
    if letter == "D":
        cfg.data.sources, cfg.data.gen_slots, cfg.prompts = sources[:1], 0, ()
        cfg.evaluate.sources = cfg.evaluate.sources[:1]
    if letter == "E":
        cfg.data.sources, cfg.data.und_slots, cfg.heldout = sources[1:], 0, ()
        cfg.evaluate.sources = cfg.evaluate.sources[1:]
        llm = ("llm/embedding", "llm/layers", "llm/norm")
        cfg.train_parts = (*llm, *(p for p in cfg.train_parts if p != "llm"))
    return cfg
