"""Stage 2, unified pre-training: trains everything but SigLIP and the VAE on both tasks.

Reproduces arXiv 2411.07975 section 4, stage 2: learning rate 1e-4, warm-up 2,000 of 390,000 steps,
batch 512, understanding : generation : text 30:50:20 for 10,000 steps, then 14:80:6, 384 px.

    python -m janusflow_jax.train --config=configs/pretrain.py

Starts from `runs/adaptation`; `--config.start=` takes any run or model folder, such as a converted
JanusFlow-1.3B. Costs 390,000 steps of 512 packed rows of 4,096 positions: 34 TFLOP a row, 6.7e9
TFLOP in all. Arguments: own, start=DIR, 256, 512, 7b, online, test (`stages.ARGUMENTS`). Latents
come from the cache `data/generate/latents` unless `online` is given.
"""

from janusflow_jax import config as c
from janusflow_jax.config import stages


def get_config(arg: str | None = None) -> c.TrainConfig:
    names, start = stages.parse(arg)
    cfg = stages.stage(
        names,
        {"understand": (30, 14), "generate": (50, 80), "text": (20, 6)},
        form="plain",
        cached="online" not in names,
        name=stages.run_name("pretrain", names, start),
        start=start or stages.run_name("runs/adaptation", names),
        train_parts=tuple(p for p in c.MODEL_PARTS if p != "und_encoder"),
        optim=c.OptimConfig(lr=1e-4, warmup_steps=2000),
        loss=c.LossConfig(norm="mixture"),
        num_steps=390_000,
    )
    cfg.data.change_row = 10_000 * cfg.batch_rows
    cfg = stages.long_run(cfg)
    return stages.test_twin(cfg, own_model="own" in names) if "test" in names else cfg
