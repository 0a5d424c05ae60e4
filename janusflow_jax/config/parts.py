"""The parts of a model: which exist, what uses them, and which of them a run trains.

A part is a top-level key of the parameter tree; the VAE is a tree of its own. A path names a part
or what lies below it: `llm/layers/block/attn`. To add a part, add a line to `USED_FOR`;
`existing` knows parts that only some configs have, and `reached` those that only a loss uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from janusflow_jax.config.model import ModelConfig
    from janusflow_jax.config.run import LoraConfig, TrainConfig

USED_FOR = {
    "llm": ("text", "understand", "generate"),
    "und_encoder": ("understand",),
    "und_aligner": ("understand",),
    "und_begin": ("understand",),
    "gen_encoder": ("generate",),
    "gen_aligner": ("generate",),
    "gen_norm": ("generate",),
    "gen_head": ("generate",),
    "gen_decoder": ("generate",),
    "repa_head": (),  # training only: the REPA loss
    "repa_target": (),  # training only: a SigLIP of its own as REPA's target, never trained
}
"""Part -> the tasks whose inputs and outputs pass through it."""

MODEL_PARTS = tuple(USED_FOR)

PRETRAINED_PARTS = ("vae", "und_encoder", "llm", "repa_target")
"""Parts that need pretrained weights before training starts (unless `allow_fresh`)."""

LORA_TARGETS = {
    "q": "attn",
    "k": "attn",
    "v": "attn",
    "o": "attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}
"""The LLM's matrix products that may have an adapter, and where each is in a block."""
LORA_TRAINED = ("lora_a", "lora_b")
LORA_SCALE = "lora_scale"
LORA_BLOCK = "llm/layers/block"


def existing(model: ModelConfig) -> tuple[str, ...]:
    """The parts that a model of this config has."""
    missing = set()
    if model.und_encoder == "shared":  # understanding uses the VAE and the generation encoder
        missing.add("und_encoder")
    if model.repa_target != "siglip":  # REPA aligns with the und_encoder's features
        missing.add("repa_target")
    return tuple(p for p in MODEL_PARTS if p not in missing)


def needed_for(task: str, model: ModelConfig) -> tuple[str, ...]:
    """The parts that a task uses: 'generate' (up to the latents), 'understand' or 'text'."""
    parts = [p for p in existing(model) if task in USED_FOR[p]]
    if task == "understand" and model.und_encoder == "shared":
        parts += ["vae", "gen_encoder"]
    return tuple(parts)


def reached(cfg: TrainConfig) -> set[str]:
    """The parts that the run's tasks and losses use. No other part can be trained."""
    tasks = ["text"]
    if cfg.data.und_slots:
        tasks.append("understand")
    if cfg.data.gen_slots:
        tasks.append("generate")
    parts = {part for task in tasks for part in needed_for(task, cfg.model)} - {"vae"}
    if cfg.data.gen_slots and cfg.loss.repa_weight:
        parts.add("repa_head")
    return parts


def trained_paths(cfg: TrainConfig) -> tuple[str, ...]:
    """The paths that this run trains: those of `train_parts` that it reaches, and its adapters."""
    usable = reached(cfg)
    paths = tuple(p for p in cfg.train_parts if top(p) in usable)
    return paths + lora_paths(cfg.lora)


def trained_parts(cfg: TrainConfig) -> set[str]:
    """The parts that this run trains, not counting adapters."""
    return {top(p) for p in trained_paths(cfg) if not is_lora_path(p)}


def top(path: str) -> str:
    """The part that a path is in."""
    return path.split("/")[0]


def lora_paths(cfg: LoraConfig) -> tuple[str, ...]:
    """The adapters' arrays that training changes; empty without adapters."""
    if not cfg.rank:
        return ()
    return tuple(
        f"{LORA_BLOCK}/{LORA_TARGETS[t]}/{t}/{leaf}" for t in cfg.targets for leaf in LORA_TRAINED
    )


def is_lora_path(path: str) -> bool:
    """Whether an array belongs to an adapter."""
    return path.rpartition("/")[2] in (*LORA_TRAINED, LORA_SCALE)
