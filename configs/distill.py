"""Distills a model into a student that generates in one to four steps, without guidance.

    python -m janusflow_jax.train --config=configs/distill.py:start=models/janusflow

The student is the same network with the same parameters: its decoder gets the time at which a step
ends instead of the time at which it begins, and learns the teacher's average velocity between the
two, with the teacher's guidance. The teacher is the start. Only the parts that generate are
trained, so captions stay as they are, to the bit (docs/few_steps.md).

Arguments:

    emoji         the quick start's model (`runs/emoji`) on CPU
    all           train all parts but SigLIP and the VAE; a quarter of all positions are images to
                  understand, against forgetting
    lora          train the parts that generate, and adapters of rank 16 on the language model, with
                  the same images to understand
    test          seconds on a CPU, through the same code
    256           256 px images instead of 384
    own           the model of the start, if it is not the released 1.3B; start=DIR: of that start
    data=DIR      images with captions, instead of data/generate and data/understand

`--config.model.student.guidance_scale` is the guidance that the student learns, and
`--config.model.student.steps` the number of its steps unless a request says otherwise.
"""

import dataclasses

from janusflow_jax import config as c
from janusflow_jax.config import stages

GENERATION = tuple(p for p in c.MODEL_PARTS if p.startswith("gen_"))
ALL = ("llm", "und_aligner", "und_begin", *GENERATION)
NAMES = {
    "emoji": "the quick start's model",
    "all": "all parts but SigLIP and the VAE, with images to understand",
    "lora": "adapters on the language model",
    "256": stages.SIZE_256,
    "own": stages.OWN,
    "test": stages.TEST,
}


def get_config(arg: str | None = None) -> c.TrainConfig:
    words, folders = c.parse_folders(arg, ("data", "start"))
    names = c.parse_arg(",".join([*words, *(["own"] if "start" in folders else [])]), NAMES)
    if {"all", "lora"} <= names:
        raise c.ConfigError("configs/distill.py: expected all or lora; got both: leave one out")
    if "256" in names and (others := sorted(names & {"emoji", "own"})):
        raise c.ConfigError(
            f"configs/distill.py: expected 256 (the released model's size) or {others[0]}; got "
            "both: leave one out"
        )
    emoji = "emoji" in names
    start = folders.get("start", "runs/emoji" if emoji else "models/janusflow")
    if "own" in names:
        model = stages.model_of(start)
    else:
        model = c.model_config("emoji") if emoji else c.model_config("1p3b", 256 * ("256" in names))
    model.student = c.StudentConfig(steps=2, guidance_scale=2.0)
    data = folders.get("data", stages.OPENMOJI if emoji else "")
    replays = bool(names & {"all", "lora"})
    weights = {"generate": 0.75, "understand": 0.25} if replays else {"generate": 1.0}
    sources = tuple(
        c.SourceConfig(name=task, path=data or stages.DATA[task], task=task, weight=weight)
        for task, weight in weights.items()
    )
    cfg = c.TrainConfig(
        name=stages.run_name("distill", names, folders.get("start", "")),
        model=model,
        data=c.DataConfig(sources=sources, row_len=4096, drop_prompt=0.0),
        optim=c.OptimConfig(lr=2e-5, warmup_steps=100, decay_steps=1900, ema=0.99),
        loss=c.LossConfig(repa_weight=0.0),
        start=start,
        train_parts=ALL if "all" in names else GENERATION,
        dtype="bfloat16",
        batch_rows=64,
        num_steps=2000,
        log_every_steps=10,
        save_every_steps=500,
        prompts=stages.LONG_RUN_PROMPTS,
        sheet_every_steps=500,
    )
    if replays:
        split = stages.OPENMOJI_HELDOUT if data == stages.OPENMOJI else "heldout"
        # Captions alone: a student has no flow loss.
        held = dataclasses.replace(sources[1], split=split, weight=1.0)
        cfg.evaluate = c.EvalConfig(sources=(held,), rows=16, every_steps=500, max_rise=0.1)
    if "lora" in names:
        cfg.lora.rank, cfg.optim.lr = 16, 1e-4
    if emoji:
        _emoji(cfg)
    text = 10 if emoji else 40  # tokens of a short prompt beside an image
    cfg.data.gen_slots = max(1, cfg.data.row_len // (model.slot_len + text))
    cfg.data.und_slots = cfg.data.gen_slots if replays else 0
    if "test" in names:
        stages.test_twin(cfg, (data,) if "data" in folders else (), own_model="own" in names)
        cfg.model.student = model.student
        cfg.lora.rank = min(cfg.lora.rank, 4)
    return cfg


def _emoji(cfg: c.TrainConfig) -> None:
    """A twelfth of the quick start's steps, with its weights of the losses and its times."""
    cfg.dtype, cfg.remat = "float32", "none"
    cfg.scan_layers, cfg.matmul_precision = False, "BF16_BF16_F32"
    cfg.data.row_len, cfg.batch_rows = 160, 8
    cfg.num_steps, cfg.optim.warmup_steps, cfg.optim.decay_steps = 200, 20, 180
    cfg.optim.lr = 1e-3
    cfg.loss.ar_weight, cfg.loss.time, cfg.loss.time_shift = 0.1, "uniform", 2.0
    cfg.prompts, cfg.sheet_every_steps = stages.OPENMOJI_PROMPTS, 100
    cfg.evaluate.every_steps, cfg.log_every_steps, cfg.save_every_steps = 100, 20, 100
    for source in cfg.data.sources:
        if source.path == stages.OPENMOJI:  # tools/prepare_openmoji.py makes the caches
            source.cache = f"{stages.OPENMOJI}/cache/{source.task}"
