"""Stage 3, supervised fine-tuning: trains all parts, SigLIP too, on conversations and images.

Reproduces arXiv 2411.07975 section 4, stage 3: learning rate 2e-5, warm-up 1,000 of 26,000 steps,
batch 256, understanding : generation : text 21:70:9, chat form, 384 px.

    python -m janusflow_jax.train --config=configs/sft.py

Starts from `runs/pretrain`; `--config.start=` takes any run or model folder. Costs 26,000 steps of
256 packed rows of 4,096 positions: 34 TFLOP a row and SigLIP's backward pass, 2.3e8 TFLOP.
Arguments: own, start=DIR, 256, 512, 7b, online, test (`stages.ARGUMENTS`). Latents
come from the cache `data/generate/latents` unless `online` is given.
"""

from janusflow_jax import config as c
from janusflow_jax.config import stages


def get_config(arg: str | None = None) -> c.TrainConfig:
    names, start = stages.parse(arg)
    cfg = stages.stage(
        names,
        {"understand": (21, -1), "generate": (70, -1), "text": (9, -1)},
        form="chat",
        cached="online" not in names,
        name=stages.run_name("sft", names, start),
        start=start or stages.run_name("runs/pretrain", names),
        train_parts=c.MODEL_PARTS,
        optim=c.OptimConfig(lr=2e-5, warmup_steps=1000),
        loss=c.LossConfig(norm="mixture"),
        batch_rows=256,
        num_steps=26_000,
    )
    cfg = stages.long_run(cfg)
    return stages.test_twin(cfg, own_model="own" in names) if "test" in names else cfg
