"""Stage 1, adaptation: trains the new parts between a frozen language model and SigLIP.

Reproduces arXiv 2411.07975 section 4, stage 1: the generation encoder and decoder, both aligners,
`und_begin` and REPA's head are trained; learning rate 1e-4, warm-up 2,000 of 10,000 steps, batch
512, understanding : generation 50:50, 384 px.

    python tools/convert_checkpoint.py --llm DIR --siglip DIR --vae DIR --out models/start
    python -m janusflow_jax.train --config=configs/adaptation.py

Costs 10,000 steps of 512 packed rows of 4,096 positions: 22 TFLOP a row, 1.1e8 TFLOP in all.
Arguments: own, start=DIR, 256, 512, 7b, online, test (`stages.ARGUMENTS`). Latents
come from the cache `data/generate/latents` unless `online` is given.
"""

from janusflow_jax import config as c
from janusflow_jax.config import stages


def get_config(arg: str | None = None) -> c.TrainConfig:
    names, start = stages.parse(arg)
    cfg = stages.stage(
        names,
        {"understand": (50, -1), "generate": (50, -1)},
        form="plain",
        cached="online" not in names,
        name=stages.run_name("adaptation", names, start),
        start=start or stages.START,
        train_parts=stages.ADAPTED,
        optim=c.OptimConfig(lr=1e-4, warmup_steps=2000),
        loss=c.LossConfig(norm="mixture"),
        num_steps=10_000,
    )
    cfg = stages.long_run(cfg)
    return stages.test_twin(cfg, own_model="own" in names) if "test" in names else cfg
