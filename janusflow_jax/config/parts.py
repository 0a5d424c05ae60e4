"""Which parts of a model exist, are needed for what, are reached by a run, and are trained.

A part is a top-level key of the parameter tree; the VAE is a tree of its own. A path is a part or
what lies below it: `llm/layers/block/attn`.
"""

from __future__ import annotations

from janusflow_jax.config.model import ModelConfig
from janusflow_jax.config.run import LORA_TARGETS, LoraConfig, TrainConfig

LORA_TRAINED = ("lora_a", "lora_b")
LORA_SCALE = "lora_scale"
LORA_BLOCK = "llm/layers/block"


def needed_to_generate() -> tuple[str, ...]:
    """The parts that compute a velocity; latents become pixels by the VAE."""
    return ("llm", "gen_encoder", "gen_aligner", "gen_norm", "gen_head", "gen_decoder")


def needed_to_understand(cfg: ModelConfig) -> tuple[str, ...]:
    """The parts that answer questions about an image."""
    encoder = ("vae", "gen_encoder") if cfg.und_encoder == "shared" else ("und_encoder",)
    return ("llm", *encoder, "und_aligner", "und_begin")


def reached_parts(cfg: TrainConfig) -> set[str]:
    """The model's parts that the run's tasks and losses reach: no other can be trained."""
    reads, makes = bool(cfg.data.und_slots), bool(cfg.data.gen_slots)
    idle = {"repa_target"}  # a target is never trained by its own loss
    if not (makes and cfg.loss.repa_weight):
        idle.add("repa_head")
    if not reads:
        idle |= {"und_encoder", "und_aligner", "und_begin"}
    if not makes:
        idle |= {"gen_aligner", "gen_norm", "gen_head", "gen_decoder"}
        if not (reads and cfg.model.und_encoder == "shared"):
            idle.add("gen_encoder")
    return {*cfg.model.parts} - idle


def trained_paths(cfg: TrainConfig) -> tuple[str, ...]:
    """The paths that this run trains: of `train_parts`, those that its tasks and losses reach."""
    reached = reached_parts(cfg)
    paths = tuple(p for p in cfg.train_parts if p.split("/")[0] in reached)
    return paths + lora_paths(cfg.lora)


def trained_parts(cfg: TrainConfig) -> set[str]:
    """The parts that this run trains, by top-level key; adapters do not make theirs one."""
    return {p.split("/")[0] for p in trained_paths(cfg) if not is_lora_path(p)}


def lora_paths(cfg: LoraConfig) -> tuple[str, ...]:
    """The leaves that training moves; none where there is no LoRA."""
    if not cfg.rank:
        return ()
    return tuple(
        f"{LORA_BLOCK}/{LORA_TARGETS[t]}/{t}/{leaf}" for t in cfg.targets for leaf in LORA_TRAINED
    )


def is_lora_path(name: str) -> bool:
    """Whether a leaf is an adapter's."""
    return name.rpartition("/")[2] in (*LORA_TRAINED, LORA_SCALE)
