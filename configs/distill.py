"""Distills a model into a student that generates in one to four steps, without guidance.

    python -m janusflow_jax.train --config=configs/distill.py:start=models/janusflow

The student is the same network with the same parameters: its decoder gets the time at which a step
ends instead of the time at which it begins, and learns the teacher's average velocity between the
two, with the teacher's guidance. The teacher is the start. A quarter of all positions are images to
understand, so that captions stay (docs/few_steps.md).

Arguments:

    emoji         the quick start's model (`runs/emoji`) on CPU
    lora          adapters of rank 16 on the language model, beside the parts that generate
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
PARTS = ("llm", "und_aligner", "und_begin", *GENERATION)
NAMES = {
    "emoji": "the quick start's model",
    "lora": "adapters on the language model",
    "256": stages.SIZE_256,
    "own": stages.OWN,
    "test": stages.TEST,
}


def get_config(arg: str | None = None) -> c.TrainConfig:
    words, folders = c.parse_folders(arg, ("data", "start"))
    names = c.parse_arg(",".join([*words, *(["own"] if "start" in folders else [])]), NAMES)
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
    sources = tuple(
        c.SourceConfig(name=task, path=data or stages.DATA[task], task=task, weight=weight)
        for task, weight in (("generate", 0.75), ("understand", 0.25))
    )
    cfg = c.TrainConfig(
        name=stages.run_name("distill", names, folders.get("start", "")),
        model=model,
        data=c.DataConfig(sources=sources, row_len=4096, drop_prompt=0.0),
        optim=c.OptimConfig(lr=2e-5, warmup_steps=100, decay_steps=1900, ema=0.99),
        loss=c.LossConfig(repa_weight=0.0),
        start=start,
        train_parts=PARTS,
        dtype="bfloat16",
        batch_rows=64,
        num_steps=2000,
        log_every_steps=10,
        save_every_steps=500,
        prompts=stages.LONG_RUN_PROMPTS,
        sheet_every_steps=500,
    )
    split = stages.OPENMOJI_HELDOUT if data == stages.OPENMOJI else "heldout"
    # Captions alone: a student has no flow loss.
    held = dataclasses.replace(sources[1], split=split, weight=1.0)
    cfg.evaluate = c.EvalConfig(sources=(held,), rows=16, every_steps=500, max_rise=0.1)
    if "lora" in names:
        cfg.lora.rank, cfg.train_parts, cfg.optim.lr = 16, GENERATION, 1e-4
    if emoji:
        _emoji(cfg)
    text = 10 if emoji else 40  # tokens of a short prompt beside an image
    cfg.data.gen_slots = cfg.data.und_slots = max(1, cfg.data.row_len // (model.slot_len + text))
    if "test" in names:
        stages.test_twin(cfg, (data,) if "data" in folders else (), own_model="own" in names)
        cfg.model.student = model.student
        cfg.lora.rank = min(cfg.lora.rank, 4)
    return cfg


def _emoji(cfg: c.TrainConfig) -> None:
    """An eighth of the quick start's steps, with its weights of the losses and its times."""
    cfg.dtype, cfg.remat = "float32", "none"
    cfg.data.row_len, cfg.batch_rows = 160, 8
    cfg.num_steps, cfg.optim.warmup_steps, cfg.optim.decay_steps = 300, 20, 280
    cfg.optim.lr = 1e-3
    cfg.loss.ar_weight, cfg.loss.time, cfg.loss.time_shift = 0.1, "uniform", 2.0
    cfg.prompts, cfg.sheet_every_steps = stages.OPENMOJI_PROMPTS, 150
    cfg.evaluate.every_steps, cfg.log_every_steps, cfg.save_every_steps = 150, 20, 100
    for source in cfg.data.sources:
        if source.path == stages.OPENMOJI:  # tools/prepare_openmoji.py makes the caches
            source.cache = f"{stages.OPENMOJI}/cache/{source.task}"
