"""Useful floating-point operations of training and sampling, for model-FLOPs utilization (MFU).

Not counted: padding, idle slots, attention across samples, the head where there is no target, and
recomputation. A multiply-add is two operations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from janusflow_jax.config import GENERATE, UNDERSTAND, ModelConfig

CACHED = frozenset({"latent_mean", "repa_target", "und_features"})


class Work(NamedTuple):
    """What the rows of a batch hold."""

    positions: int  # of samples, without padding and dropped prompts
    pairs: float  # of positions where one attends to the other
    targets: int
    gen_images: int
    und_images: int
    padding: float  # share of all positions that is not in `positions`
    idle_slots: float  # share of the slots that the encoders run on
    cached: frozenset[str] = frozenset()  # arrays in the batch that replace an encoder

    def flops(self, cfg: ModelConfig, trained: set[str], repa: bool) -> float:
        """Operations forward and backward; see `train_flops`."""
        return train_flops(cfg, self, trained, repa)


def count(batch: dict[str, np.ndarray], gen_slots: int, und_slots: int) -> Work:
    """Counts rows.

    Args:
      batch: segment_ids int[B, T], target_mask bool[B, T], slot_task int[B, K]. Of arrays from
        caches (`data/slots.py`) only the names count.
      gen_slots, und_slots: Kg and Ku, the slots that the encoders of each task run on.
    """
    ids, task = batch["segment_ids"], batch["slot_task"]
    rows, length = ids.shape
    segments = int(ids.max()) + 1
    flat = (ids + segments * np.arange(rows)[:, None]).ravel()
    sizes = np.bincount(flat, minlength=rows * segments)
    sizes = sizes.reshape(rows, segments)[:, 1:].astype(np.float64)
    used = int(sizes.sum())
    gen, und = (int((task == t).sum()) for t in (GENERATE, UNDERSTAND))
    slots = rows * (gen_slots + und_slots)
    return Work(
        positions=used,
        pairs=float((sizes * (sizes + 1) / 2).sum()),
        targets=int(batch["target_mask"].sum()),
        gen_images=gen,
        und_images=und,
        padding=1 - used / (rows * length),
        idle_slots=1 - (gen + und) / slots if slots else 0.0,
        cached=frozenset(CACHED & set(batch)),
    )


def train_flops(cfg: ModelConfig, work: Work, trained: set[str], repa: bool) -> float:
    """Operations of one forward and backward pass over `work`.

    A trained part costs three forward passes (forward, gradients of inputs, gradients of weights),
    a frozen part that gradients pass through two, any other part one.

    Args:
      trained: top-level parts that the run trains.
      repa: whether the REPA loss is on.
    """

    def times(part: str, passes_through: bool) -> int:
        return 3 if part in trained else 2 if passes_through else 1

    images = work.gen_images + work.und_images
    llm = times("llm", True)
    total = llm * 2.0 * llm_kernel(cfg) * work.positions
    total += 3 * attention_per_pair(cfg) * work.pairs  # no weights: 1 forward, 2 backward
    total += llm * 2.0 * cfg.llm.width * cfg.llm.vocab_size * work.targets
    gen = times("gen_encoder", True)
    total += gen * (gen_encoder(cfg) + gen_decoder(cfg)) * work.gen_images
    total += vae_encoder(cfg) * work.gen_images * ("latent_mean" not in work.cached)
    total += 3 * aligner(cfg, "generate") * work.gen_images
    if work.und_images:
        total += 3 * aligner(cfg, "understand") * work.und_images
        if "und_features" not in work.cached:
            encoder = times("und_encoder", False)
            if cfg.und_encoder == "siglip":
                per_image = encoder * siglip(cfg)
            else:
                own = cfg.und_encoder == "own"
                per_image = (encoder if own else 1) * vae_encoder(cfg) + 3 * gen_encoder(cfg)
            total += per_image * work.und_images
    if cfg.student.steps and work.gen_images:
        total += teacher_flops(cfg) * work.gen_images
    if repa and images:
        target = siglip(cfg) * ("repa_target" not in work.cached)
        total += (target + 3 * repa_head(cfg)) * work.gen_images
    return total


def teacher_flops(cfg: ModelConfig) -> float:
    """What the target of a student costs for each image: the branches of its teacher, without their
    prompts, and the student's decoder at two more times."""
    slot, branches = cfg.slot_len, 1 if cfg.student.guidance_scale == 1 else 2
    llm = 2.0 * llm_kernel(cfg) * slot + attention_per_pair(cfg) * slot * (slot + 1) / 2
    once = gen_encoder(cfg) + aligner(cfg, "generate") + 2 * gen_decoder(cfg)
    return once + branches * (llm + gen_decoder(cfg))


# --- forward passes of the parts, one image or one position


def llm_kernel(cfg: ModelConfig) -> float:
    """Weights of the LLM's blocks: one multiply-add per position each."""
    m = cfg.llm
    attn = 2.0 * m.width * m.head_dim * (m.num_heads + m.num_kv_heads)
    return m.num_layers * (attn + 3 * m.width * m.mlp_width)


def attention_per_pair(cfg: ModelConfig) -> float:
    """Scores and weighted values of a pair of positions, in all heads and layers."""
    return 4.0 * cfg.llm.num_layers * cfg.llm.num_heads * cfg.llm.head_dim


def aligner(cfg: ModelConfig, task: str) -> float:
    seen = cfg.und.width if task == "understand" and cfg.und_encoder == "siglip" else cfg.gen.width
    return 2.0 * cfg.num_image_tokens * seen * cfg.llm.width


def repa_head(cfg: ModelConfig) -> float:
    width = cfg.repa.width
    return 2.0 * cfg.num_image_tokens * width * (cfg.llm.width + width + cfg.und.width)


def siglip(cfg: ModelConfig) -> float:
    m = cfg.und
    block = 2.0 * (4 * m.width**2 + 2 * m.width * m.mlp_width) + 4.0 * m.num_tokens * m.width
    return m.num_tokens * (m.num_layers * block + 2.0 * 3 * m.patch_size**2 * m.width)


def _convnext(cfg: ModelConfig, width: int) -> float:
    kernel = 49 + 8 * width  # depthwise 7x7, and two linears of width x 4 width
    film = 4.0 * cfg.llm.width * width
    return cfg.gen.num_blocks * (2.0 * cfg.num_image_tokens * width * kernel + film)


def gen_encoder(cfg: ModelConfig) -> float:
    m, tokens = cfg.gen, cfg.num_image_tokens
    time = 2.0 * cfg.llm.width * (m.width + cfg.llm.width)
    patches = 2.0 * tokens * m.patch_size**2 * cfg.vae.latent_channels * m.width
    return time + patches + _convnext(cfg, m.width)


def gen_decoder(cfg: ModelConfig) -> float:
    """Includes the linear before it, `gen_head`."""
    m, tokens = cfg.gen, cfg.num_image_tokens
    out = m.patch_size**2 * cfg.vae.latent_channels
    linears = 2.0 * tokens * (cfg.llm.width * m.width + 2 * m.width * out)
    return linears + _convnext(cfg, 2 * m.width)


def vae_encoder(cfg: ModelConfig) -> float:
    m = cfg.vae
    side, before = cfg.image_size, m.channels[0]
    total = 9 * 3 * before * side**2

    def resnet(a: int, b: int) -> int:
        return (9 * a * b + 9 * b * b + (a * b if a != b else 0)) * side**2

    for i, channels in enumerate(m.channels):
        for _ in range(m.layers_per_block):
            total += resnet(before, channels)
            before = channels
        if i + 1 < len(m.channels):
            side //= 2
            total += 9 * channels * channels * side**2
    total += 2 * resnet(before, before)
    total += 4 * before * before * side**2 + 2 * before * side**4  # single-head attention
    latent = 2 * m.latent_channels
    total += (9 * before * latent + m.quant_convs * latent * latent) * side**2
    return 2.0 * total


def vae_decoder(cfg: ModelConfig) -> float:
    m = cfg.vae
    widths = m.decoder_channels or m.channels
    side, before = cfg.latent_size, widths[-1]
    latent = m.latent_channels
    quant = m.quant_convs * latent * latent
    total = (quant + 9 * latent * before + 2 * 18 * before * before) * side**2
    total += 4 * before * before * side**2 + 2 * before * side**4  # single-head attention
    for i, channels in enumerate(reversed(widths)):
        for _ in range(m.layers_per_block + 1):
            skip = before * channels if before != channels else 0
            total += (9 * before * channels + 9 * channels * channels + skip) * side**2
            before = channels
        if i + 1 < len(widths):
            side *= 2
            total += 9 * channels * channels * side**2
    return 2.0 * (total + 9 * before * 3 * side**2)


def image_flops(cfg: ModelConfig, prompt: int, guided: int, unguided: int = 0) -> float:
    """Generating the latents of one image.

    Args:
      prompt: number of its tokens.
      guided, unguided: steps with two branches, and with the conditional one alone.
    """
    slot = cfg.slot_len
    llm = 2.0 * llm_kernel(cfg)
    first = llm * prompt + attention_per_pair(cfg) * prompt * (prompt + 1) / 2
    inside = slot * (slot + 1) / 2
    branch = llm * slot + gen_decoder(cfg) + attention_per_pair(cfg) * inside
    cond = branch + attention_per_pair(cfg) * slot * prompt
    uncond = branch + attention_per_pair(cfg) * slot  # sees only BOS
    encoder = gen_encoder(cfg) + aligner(cfg, "generate")
    return first + (guided + unguided) * (encoder + cond) + guided * uncond
