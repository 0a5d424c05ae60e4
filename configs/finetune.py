"""Fine-tunes a converted JanusFlow, or any run, on your own images, without forgetting.

    python tools/prepare_data.py folder my_images --out data/mine \\
        --tokenizer models/janusflow/hub --heldout 0.02
    python -m janusflow_jax.train --config=configs/finetune.py:generate

Arguments (docs/finetuning.md has what each needs in memory):

    generate      train on `data/mine` for captions -> images
    understand    train on `data/mine` for images -> captions; one of the two or both
    replay        against forgetting: a quarter of all positions comes from `data/replay` (images
                  with captions), mostly for the task that you do not train
    lora          adapters of rank 16 on the language model; all other parts are frozen
    light         for one device with little memory: frozen parts and moments in bfloat16, short
                  rows
    emoji         the quick start's model (`runs/emoji`) on CPU, in five to ten minutes
    test          seconds on a CPU, through the same code
    256           256 px images instead of 384; not with emoji
    own           the model of the start, if it is not the released 1.3B; start=DIR: of that start
    mine=DIR      your data set, instead of `data/mine`
    watch=DIR     the data set to watch, and to replay with `replay`, instead of `data/replay`
                  (with emoji: instead of `data/openmoji`)

Any field can be set: `--config.data.sources[0].weight=...` (in the order generate, understand,
replay).
The run measures held-out losses of both tasks before, during and after training, on `data/mine`
(split heldout) and on `data/replay`. A loss that ends 10 % above its start logs a warning; with
`--config.evaluate.stop_on_rise=True` the run saves and exits. The learning rate is a fifth of
pre-training's (LoRA has its own), warm-up 100 steps. Raise `--config.num_steps` with your data:
2,000 steps of 16 rows see about 190,000 images.
"""

import dataclasses
import json
from pathlib import Path

from janusflow_jax import config as c
from janusflow_jax.config import files, stages

MINE, REPLAY = "data/mine", "data/replay"
PARTS = tuple(p for p in c.MODEL_PARTS if p not in ("und_encoder", "repa_head", "repa_target"))
NAMES = {
    "generate": "captions -> images",
    "understand": "images -> captions",
    "replay": "a quarter of all positions against forgetting",
    "lora": "adapters on the language model",
    "light": "one device of little memory",
    "256": stages.SIZE_256,
    "own": stages.OWN,
    "emoji": "the quick start's model",
    "test": stages.TEST,
}

OLD_NAMES = {"paint": "generate", "read": "understand", "kept": "watch"}  # of 0.1; remove in 0.3


def get_config(arg: str | None = None) -> c.TrainConfig:
    names, folders, run_name = _split(arg)
    emoji = "emoji" in names
    mine = folders.get("mine", MINE)
    replay = folders.get("watch", stages.OPENMOJI if emoji else REPLAY)
    tasks = [task for task in ("generate", "understand") if task in names]
    if not tasks:
        raise c.ConfigError(
            "configs/finetune.py: expected generate, understand or both (:generate or "
            f":generate,lora); got {sorted(names) or 'none'}"
        )
    if len(models := sorted(names & {"emoji", "256", "own"})) > 1:
        raise c.ConfigError(
            "configs/finetune.py: expected one of emoji (the quick start's model, 64 px), 256 (the "
            f"released one's size) and own (the start's); got {' and '.join(models)}: leave one out"
        )
    own = tuple(
        c.SourceConfig(name=f"mine_{task}", path=mine, task=task, weight=1 / len(tasks))
        for task in tasks
    )
    replayed = tuple(
        c.SourceConfig(name=f"replay_{task}", path=replay, task=task, weight=0.0)
        for task in ("generate", "understand")
    )
    start = folders.get("start", "models/janusflow")
    size = 256 if "256" in names else 384
    cfg = c.TrainConfig(
        name=run_name,
        model=stages.model_of(start) if "own" in names else c.model_config("1p3b", size),
        data=c.DataConfig(sources=own, row_len=4096),
        optim=c.OptimConfig(lr=2e-5, warmup_steps=100, ema=0.0 if "light" in names else 0.99),
        loss=c.LossConfig(repa_weight=0.0),
        start=start,
        train_parts=PARTS,
        dtype="bfloat16",
        batch_rows=16,
        num_steps=2000,
        log_every_steps=10,
        save_every_steps=500,
    )
    if "replay" in names:
        # mostly of the task that is not trained, which the model forgets
        other = {"generate": 1.0, "understand": 1.0} | ({} if len(tasks) > 1 else {tasks[0]: 0.25})
        total = sum(other.values())
        for source in replayed:
            source.weight = other[source.task] / total / 3
        cfg.data.sources += replayed
    usual = {stages.OPENMOJI: stages.OPENMOJI_HELDOUT}
    if emoji and "mine" not in folders:  # docs/finetuning.md makes it with prepare_openmoji.py
        usual[MINE] = stages.OPENMOJI_HELDOUT
    held = tuple(
        dataclasses.replace(
            s, split=_heldout_split(s.path, usual.get(s.path, "heldout")), weight=1.0
        )
        for s in (*own, *replayed)
    )
    cfg.evaluate = c.EvalConfig(sources=held, rows=16, every_steps=500, max_rise=0.1)
    if "lora" in names:
        cfg.lora.rank, cfg.train_parts, cfg.optim.lr = 16, (), 1e-4
    if "light" in names:
        cfg.frozen_dtype = cfg.optim.moments_dtype = "bfloat16"
        cfg.data.row_len, cfg.batch_rows, cfg.optim.accum_steps = 1024, 16, 16
    if emoji:
        _emoji(cfg)
    trained = {s.task for s in cfg.data.sources}
    text = 10 if emoji else 40  # tokens of a short prompt beside an image
    slots = max(1, cfg.data.row_len // (cfg.model.slot_len + text))
    cfg.data.gen_slots = slots if "generate" in trained else 0
    cfg.data.und_slots = slots if "understand" in trained else 0
    if "test" in names:
        chosen = tuple(folders[n] for n in ("mine", "watch") if n in folders)
        stages.test_twin(cfg, own_folders=chosen, own_model="own" in names)
        cfg.lora.rank = min(cfg.lora.rank, 4)
        cfg.optim.accum_steps = 1
    return cfg


def _split(arg: str | None) -> tuple[set[str], dict[str, str], str]:
    """The names in the argument, its folders by name, and the name of the run."""
    written, folders = c.parse_folders(arg, ("mine", "watch", "start", "kept"))
    folders = {OLD_NAMES.get(name, name): folder for name, folder in folders.items()}
    # The words as they were written: a run that was started with old names finds its folder.
    parts = [Path(x).name for x in folders.values()] + sorted({*written})
    words = [OLD_NAMES.get(word, word) for word in written]
    names = c.parse_arg(",".join([*words, *(["own"] if "start" in folders else [])]), NAMES)
    return names, folders, "-".join(["finetune", *parts])


def _emoji(cfg: c.TrainConfig) -> None:
    """The quick start's model on drawings of new classes; its own drawings are the replay."""
    cfg.model = c.model_config("emoji")
    cfg.start, cfg.dtype, cfg.remat = "runs/emoji", "float32", "none"
    cfg.scan_layers, cfg.matmul_precision = False, "BF16_BF16_F32"
    cfg.data.row_len, cfg.batch_rows, cfg.optim.accum_steps = 160, 8, 1
    # The learning rate of its pre-training, and long enough to learn the replayed captions again:
    # 300 steps at this rate lose captions with and without replay (docs/finetuning.md).
    cfg.num_steps, cfg.optim.warmup_steps, cfg.optim.decay_steps = 1000, 20, 500
    cfg.optim.lr = 1e-3
    cfg.loss.time_shift = 3.0
    cfg.evaluate.every_steps, cfg.log_every_steps, cfg.save_every_steps = 100, 20, 500


def _heldout_split(path: str, usual: str) -> str:
    """The held-out split that a data set has: each tool that prepares data has its own name for it.

    Args: usual: the name where there is no data set yet.
    """
    try:
        info = json.loads((files.resolve(path) / "dataset_info.json").read_text())
        splits = {split["name"] for split in info["splits"]}
    except Exception:  # noqa: BLE001 - the run reports it when it opens the data set
        return usual
    drawings = stages.OPENMOJI_HELDOUT in splits and "heldout" not in splits
    return stages.OPENMOJI_HELDOUT if drawings else "heldout"
