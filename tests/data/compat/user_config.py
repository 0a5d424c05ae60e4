"""A user's own config file, as people have it: it imports the package's config modules only.

    python -m janusflow_jax.train --config=tests/data/compat/user_config.py:lora

Arguments: `lora` (adapters on the language model), `cached` (heads only, encoders from a cache),
`256` (the released size, to compare fields). Paths are relative to the repository root.
"""

import dataclasses

from janusflow_jax.config_stages import stage

import janusflow_jax.config as c
from janusflow_jax import config_stages
from janusflow_jax.config import LoraConfig, SourceConfig, TrainConfig, model_config

FOLDER = "tests/data/compat"
NAMES = {"lora": "adapters", "cached": "from caches", "256": config_stages.SIZE_256}


def get_config(arg: str | None = None) -> TrainConfig:
    names = c.parse_arg(arg, NAMES)
    unknown = set(config_stages.ADAPTED) - set(c.STAGE_PARTS)
    if unknown or config_stages.ADAPTED == c.STAGE_PARTS:
        raise c.ConfigError(f"expected parts of the model; got {unknown}")
    cfg = stage(
        names,
        {"understand": (1, 1), "generate": (1, 3), "text": (0, 0)},
        "chat",
        name="mine",
        made_by=(),
        start=f"{FOLDER}/model",
        tokenizer=f"{FOLDER}/model/hub",
        train_parts=config_stages.ADAPTED,
    )
    if "256" in names:
        return cfg
    cfg.model = tiny()
    cfg.data = dataclasses.replace(
        cfg.data,
        sources=tuple(
            SourceConfig(
                name=s.name,
                path=f"{FOLDER}/data",
                task=s.task,
                weight=0.5,
                cache=f"{FOLDER}/cache_{s.task}" if "cached" in names else "",
            )
            for s in cfg.data.sources
        ),
        row_len=96,
        gen_slots=2,
        und_slots=2,
        num_threads=1,
    )
    cfg.mesh = c.MeshConfig()
    cfg.optim = c.OptimConfig(lr=1e-2, warmup_steps=1, ema=0.5)
    cfg.loss = c.LossConfig(repa_weight=1.0 if "cached" in names else 0.0)
    cfg.batch_rows, cfg.num_steps, cfg.seed = 8, 2, 1
    cfg.dtype, cfg.remat = "float32", False
    cfg.log_every_steps, cfg.save_every_steps, cfg.keep_checkpoints = 1, 2, 1
    if "lora" in names:
        cfg.train_parts = ()
        cfg.lora = LoraConfig(rank=2, targets=("q", "v", "down"))
        cfg.evaluate = c.EvalConfig(
            sources=tuple(
                dataclasses.replace(s, name=f"heldout_{s.task}", split="heldout")
                for s in cfg.data.sources
            ),
        )
    if "cached" in names:
        cfg.train_parts = ("gen_head", "und_aligner", "repa_head")
    return cfg


def tiny() -> c.ModelConfig:
    """The size `test`, made smaller still."""
    model = model_config("test")
    model.llm = c.LlamaConfig(
        vocab_size=640, width=16, mlp_width=32, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=8,
    )
    model.und = c.SiglipConfig(image_size=64, width=16, num_layers=1, num_heads=2, mlp_width=32)
    model.gen = c.GenConfig(width=8)
    model.vae = c.VaeConfig(channels=(4, 4, 4, 4), layers_per_block=1, norm_groups=2)
    model.repa = c.RepaConfig(layer=1, width=16)
    return model
