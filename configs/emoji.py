"""The quick start: paint and read OpenMoji drawings, from nothing to a sheet on a laptop CPU.

All of the real code path at small dimensions: 64 px, LLM 192 x 4, pre-training's objective
(AR + RF + REPA) and what it trains (all but SigLIP and the VAE), understanding and generation
mixed 25:75 by positions. The VAE, SigLIP and LLM start from the weights that ship in `starts/`.

    python tools/prepare_openmoji.py --out data/openmoji
    python -m janusflow_jax.train --config=configs/emoji.py

Arguments: `long` (nearly four times the steps), `norepa`, `test`.
Cost and what to expect: README, with the sheets of both.
"""

import dataclasses

from janusflow_jax import config as c

DATA = "data/openmoji"
PROMPTS = (  # of data/openmoji_sheet.py: fixed before training, every third pair never trained
    "a red apple",
    "a red heart",
    "a red umbrella",
    "an orange pumpkin",
    "an orange cat",
    "an orange star",
    "a yellow banana",
    "a yellow moon",
    "a yellow car",
    "a green frog",
    "a green tree",
    "a green balloon",
    "a cyan fish",
    "a cyan drop",
    "a cyan crown",
    "a blue whale",
    "a blue book",
    "a blue mushroom",
    "a purple butterfly",
    "a purple key",
    "a purple rocket",
    "a pink pig",
    "a pink dress",
    "a pink turtle",
)


def get_config(arg: str | None = None) -> c.TrainConfig:
    names = c.parse_arg(
        arg,
        {
            "long": "nearly four times the steps",
            "norepa": "without the REPA loss",
            "test": "seconds: a tiny fresh model, for the tests",
        },
    )
    understand = c.SourceConfig(
        name="describe", path=DATA, task="understand", format="chat", weight=0.25
    )
    generate = c.SourceConfig(name="paint", path=DATA, task="generate", format="chat", weight=0.75)
    heldout = tuple(
        dataclasses.replace(understand, name=split, split=split)
        for split in ("heldout_pairs", "heldout_views")
    )
    steps = 4500 if "long" in names else 1200
    cfg = c.TrainConfig(
        name="-".join(["emoji", *sorted(names)]),
        model=c.model_config("emoji"),
        data=c.DataConfig(sources=(understand, generate), row_len=160, gen_slots=5, und_slots=2),
        optim=c.OptimConfig(lr=1e-3, warmup_steps=50, decay_steps=steps // 2, ema=0.995),
        # On drawings of flat colour the first tenth of time decides the hue, and logit-normal times
        # are there once in 70; shifted by 3 towards noise, once in 7.
        loss=c.LossConfig(repa_weight=0.0 if "norepa" in names else 1.0, time_shift=3.0),
        init=(
            ("vae", "starts/emoji_vae"),
            ("und_encoder", "starts/emoji_llm"),
            ("llm", "starts/emoji_llm"),
        ),
        train_parts=tuple(p for p in c.STAGE_PARTS if p != "und_encoder"),
        batch_rows=8,
        num_steps=steps,
        seed=1,  # 0 made the starts, and with it a fresh und_aligner would be half theirs
        remat=False,
        log_every_steps=20,
        save_every_steps=500,
        sheet_every_steps=steps // 3,
        sheet_cfg_weight=2.0,
        prompts=PROMPTS,
        heldout=heldout,
    )
    if "test" in names:
        cfg.model = c.model_config("test")
        cfg.init, cfg.allow_fresh, cfg.tokenizer = (), True, "starts/emoji_llm/hub"
        for source in cfg.data.sources:
            source.weight = 0.5  # few rows, and both tasks in each
        cfg.num_steps, cfg.batch_rows, cfg.log_every_steps, cfg.save_every_steps = 4, 8, 1, 2
        cfg.optim.warmup_steps, cfg.optim.decay_steps = 2, 0
        cfg.prompts, cfg.heldout_captions, cfg.sheet_num_steps = PROMPTS[:2], 2, 2
    return cfg
