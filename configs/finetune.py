"""Fine-tuning: a converted JanusFlow, or any run, on your own pictures, without forgetting.

    python tools/prepare_data.py folder my_pictures --out data/mine \\
        --tokenizer models/janusflow/hub --heldout 0.02
    python -m janusflow_jax.train --config=configs/finetune.py:paint --config.start=models/janusflow

Arguments (docs/finetuning.md has what each needs in memory):

    paint, read   what `data/mine` is for: captions -> pictures, pictures -> captions; one or both
    replay        keep the rest: a quarter of all positions from `data/replay` (pictures with
                  captions; both tasks, whichever you do not train most)
    lora          adapters of rank 16 on the language model instead of all of it; with `paint` the
                  generation parts stay as they are too
    light         one device of little memory: frozen parts and moments in bfloat16, short rows
    emoji         the quick start's model (`runs/emoji`) on CPU, in five to ten minutes
    test          seconds on a CPU, through the same code
    256           256 px pictures instead of 384; not with emoji
    mine=DIR      your data set, instead of `data/mine`
    kept=DIR      what is measured beside it, and replayed with `replay`, instead of `data/replay`

Any field can be set: `--config.data.sources[0].weight=...` (in order: of paint, read, replay).
Held-out losses of both tasks are measured before, during and after on `data/mine` (split
heldout) and on `data/replay`; a loss that ends a tenth above its start is told loudly, and with
`--config.evaluate.stop_on_rise=True` ends the run, saved. The rate is a fifth of pre-training's
(LoRA: its own), warm-up 100 steps; raise `--config.num_steps` with your data: 2,000 steps of 16
rows see about 190,000 pictures.
"""

import dataclasses

from janusflow_jax import config as c
from janusflow_jax.config import stages

MINE, REPLAY = "data/mine", "data/replay"
PARTS = tuple(p for p in c.MODEL_PARTS if p not in ("und_encoder", "repa_head", "repa_target"))
NAMES = {
    "paint": "captions -> pictures",
    "read": "pictures -> captions",
    "replay": "a quarter of all positions keeps the rest",
    "lora": "adapters on the language model",
    "light": "one device of little memory",
    "256": stages.SIZE_256,
    "emoji": "the quick start's model",
    "test": stages.TEST,
}


def get_config(arg: str | None = None) -> c.TrainConfig:
    names, folders = _split(arg)
    mine, replay = folders.get("mine", MINE), folders.get("kept", REPLAY)
    tasks = [
        task for name, task in (("paint", "generate"), ("read", "understand")) if name in names
    ]
    if not tasks:
        raise c.ConfigError(
            "configs/finetune.py: expected paint, read or both (:paint or :paint,lora); got "
            f"{sorted(names) or 'none'}"
        )
    if {"emoji", "256"} <= names:
        raise c.ConfigError(
            "configs/finetune.py: expected emoji (the quick start's model, 64 px) or 256 (the "
            "released one's size); got both: leave one out"
        )
    own = tuple(
        c.SourceConfig(name=f"mine_{task}", path=mine, task=task, weight=1 / len(tasks))
        for task in tasks
    )
    kept = tuple(
        c.SourceConfig(name=f"replay_{task}", path=replay, task=task, weight=0.0)
        for task in ("generate", "understand")
    )
    cfg = c.TrainConfig(
        name="-".join(["finetune", *map(_last, folders.values()), *sorted(names)]),
        model=c.model_config("1p3b", 256 if "256" in names else 384),
        data=c.DataConfig(sources=own, row_len=4096),
        optim=c.OptimConfig(lr=2e-5, warmup_steps=100, ema=0.0 if "light" in names else 0.99),
        loss=c.LossConfig(repa_weight=0.0),
        start="models/janusflow",
        train_parts=PARTS,
        dtype="bfloat16",
        batch_rows=16,
        num_steps=2000,
        log_every_steps=10,
        save_every_steps=500,
    )
    if "replay" in names:
        # most of it from the task that is not trained: that one is forgotten
        other = {"generate": 1.0, "understand": 1.0} | ({} if len(tasks) > 1 else {tasks[0]: 0.25})
        total = sum(other.values())
        for source in kept:
            source.weight = other[source.task] / total / 3
        cfg.data.sources += kept
    held = tuple(dataclasses.replace(s, split="heldout", weight=1.0) for s in (*own, *kept))
    cfg.evaluate = c.EvalConfig(sources=held, rows=16, every_steps=500, max_rise=0.1)
    if "lora" in names:
        cfg.lora.rank, cfg.train_parts, cfg.optim.lr = 16, (), 1e-4
    if "light" in names:
        cfg.frozen_dtype = cfg.optim.moments_dtype = "bfloat16"
        cfg.data.row_len, cfg.batch_rows, cfg.optim.accum_steps = 1024, 16, 16
    if "emoji" in names:
        _emoji(cfg)
    _use_drawings(cfg, emoji="emoji" in names)
    trained = {s.task for s in cfg.data.sources}
    text = 10 if "emoji" in names else 40  # tokens beside a picture, a short prompt
    slots = max(1, cfg.data.row_len // (cfg.model.slot_len + text))
    cfg.data.gen_slots = slots if "generate" in trained else 0
    cfg.data.und_slots = slots if "understand" in trained else 0
    if "test" in names:
        stages.test_twin(cfg, given=tuple(folders.values()))
        cfg.lora.rank = min(cfg.lora.rank, 4)
        cfg.optim.accum_steps = 1
    return cfg


def _split(arg: str | None) -> tuple[set[str], dict[str, str]]:
    """The argument's names, and its folders by name."""
    words = [w.strip() for w in (arg or "").split(",")]
    folders = dict(w.split("=", 1) for w in words if "=" in w)
    wrong = sorted(n for n, folder in folders.items() if n not in ("mine", "kept") or not folder)
    if wrong:
        raise c.ConfigError(f"configs/finetune.py: expected mine=DIR or kept=DIR; got {wrong}")
    return c.parse_arg(",".join(w for w in words if "=" not in w), NAMES), folders


def _last(folder: str) -> str:
    """What a folder is called, for the run's name."""
    return folder.rstrip("/").rpartition("/")[2]


def _emoji(cfg: c.TrainConfig) -> None:
    """The quick start's model on drawings of other classes; its own drawings are the replay."""
    cfg.model = c.model_config("emoji")
    cfg.start, cfg.dtype, cfg.remat = "runs/emoji", "float32", False
    cfg.data.row_len, cfg.batch_rows, cfg.optim.accum_steps = 160, 8, 1
    # The rate of its pre-training, and long enough that replayed captions are learned again
    # (docs/finetuning.md: 300 steps at this rate lose captions with replay as well as without).
    cfg.num_steps, cfg.optim.warmup_steps, cfg.optim.decay_steps = 1000, 20, 500
    cfg.optim.lr = 1e-3
    cfg.loss.time_shift = 3.0
    cfg.evaluate.every_steps, cfg.log_every_steps, cfg.save_every_steps = 100, 20, 500


def _use_drawings(cfg: c.TrainConfig, emoji: bool) -> None:
    """Folders of tools/prepare_openmoji.py have a held-out split of another name. Folders with
    other names are taken for those of prepare_data.py.

    Args: emoji: `data/mine` is such a folder, and `data/openmoji` replaces `data/replay`.
    """
    drawings = {stages.OPENMOJI, MINE} if emoji else {stages.OPENMOJI}
    for source in (*cfg.data.sources, *cfg.evaluate.sources):
        if emoji and source.path == REPLAY:
            source.path = stages.OPENMOJI
        if source.path.rstrip("/") in drawings and source.split == "heldout":
            source.split = stages.OPENMOJI_HELDOUT
