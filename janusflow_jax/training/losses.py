"""The training objective: AR + RF + REPA as sums and counts, and what it draws at random.

Source: arXiv 2411.07975 sections 3.2 and 3.3, SPEC section 4. Drawing and computing are apart:
`draw` is keyed by (seed, row, slot), so a row's numbers do not depend on the batch it is in.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.config import GENERATE, LossConfig, ModelConfig
from janusflow_jax.models import encode, janusflow, layers
from janusflow_jax.parallel import sharding
from janusflow_jax.sampling import flow
from janusflow_jax.training import cross_entropy

Batch = dict[str, Array]
Sums = dict[str, Array]
TASKS = ("ar", "rf", "repa")
T_BUCKETS = 4


def draw(key: Array, batch: Batch, cfg: ModelConfig, loss: LossConfig, num_gen: int) -> Batch:
    """Times, noise and posterior samples for every generation slot.

    Args: key: the run's; batch: needs `row` uint32[B]; num_gen: Kg.
    Returns: t float32[B, Kg], noise and posterior float32[B, Kg, h, w, C].
    """

    def one(row: Array, slot: Array) -> Batch:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row), slot), 3)
        return {
            "t": flow.sample_time(keys[0], loss.time, loss.time_shift),
            "noise": jax.random.normal(keys[1], cfg.latent_shape),
            "posterior": jax.random.normal(keys[2], cfg.latent_shape),
        }

    slots = jnp.arange(num_gen)
    return jax.vmap(lambda row: jax.vmap(lambda slot: one(row, slot))(slots))(batch["row"])


def counts(batch: Batch, num_gen: int) -> Sums:
    """What each task's sum is divided by: target tokens, generation slots, generation slots."""
    slots = jnp.sum(batch["slot_task"][:, :num_gen] == GENERATE).astype(jnp.float32)
    targets = jnp.sum(batch["target_mask"]).astype(jnp.float32)
    return {"ar": targets, "rf": slots, "repa": slots}


def weights(loss: LossConfig, totals: Sums, shares: dict[str, Any]) -> Sums:
    """Factor of each task's sum in the loss: weight / count (times its share if per_sample)."""
    given = {"ar": loss.ar_weight, "rf": loss.rf_weight, "repa": loss.repa_weight}
    share = shares if loss.norm == "per_sample" else dict.fromkeys(TASKS, 1.0)
    return {n: given[n] * share[n] / jnp.maximum(totals[n], 1.0) for n in TASKS}


def cosine(a: Float[Array, "*b D"], b: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """Cosine similarity in float32, 0 with zero gradient where either side is zero."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    scale = layers.safe_norm(a, -1, keepdims=False) * layers.safe_norm(b, -1, keepdims=False)
    return jnp.sum(a * b, axis=-1) / jnp.where(scale == 0, 1.0, scale)


def loss_sums(
    params: Any,
    vae_params: Any,
    batch: Batch,
    draws: Batch,
    *,
    model: janusflow.JanusFlow,
    loss: LossConfig,
    num_gen: int,
    num_und: int,
    latents: Array | None = None,
    repa_target: Array | None = None,
) -> tuple[Sums, dict[str, Array]]:
    """One forward pass over rows: the three tasks' summed losses.

    Args:
      batch: rows and slots (DESIGN section 1), images uint8[B, K, H, W, 3]; or, in place of
        pictures, latent_mean and latent_logvar, repa_target, und_features (`data/slots.py`).
      draws: of `draw`.
      num_gen, num_und: Kg and Ku; generation sees slots[:Kg], understanding slots[-Ku:].
      latents: float32[B, Kg, h, w, C], scaled, instead of the VAE's (a test).
      repa_target: [B, Kg, S, E] instead of SigLIP's features (a test).
    Returns:
      sums {'ar', 'rf', 'repa'} and extras: rf by t-bucket, the predicted velocity.
    """
    cfg, dtype = model.cfg, model.dtype

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    task, start = batch["slot_task"], batch["slot_start"]
    rows = len(task)
    text = run("embed_tokens", batch["tokens"])
    gen_slots = und_slots = None
    features: Any = None
    t_emb: Any = None
    velocity_target: Any = None
    gen_images = batch["images"][:, :num_gen]
    if num_gen:
        if latents is None:
            noise = None if loss.vae_mode else draws["posterior"]
            if "latent_mean" in batch:
                latents = encode.scaled_latents(
                    batch["latent_mean"], batch["latent_logvar"], noise, cfg
                )
            else:
                latents = encode.encode_latents(vae_params, gen_images, noise, cfg, dtype)
        z = flow.interpolate(latents, draws["noise"], draws["t"])
        velocity_target = latents - draws["noise"]
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        gen_slots, features, t_emb = run("generation_slot", flat(z), flat(draws["t"]))
        gen_slots = gen_slots.reshape(rows, num_gen, *gen_slots.shape[1:])
    if num_und and "und_features" in batch:
        read = lambda seen: run("features_slot", seen.astype(dtype))  # noqa: E731
        und_slots = encode.over_slots(read, batch["und_features"])
    elif num_und:
        und_images = batch["images"][:, -num_und:]
        through_vae = encode.PIXELS_AT_ONCE // cfg.image_size**2
        und_slots = encode.over_slots(
            lambda pixels: run(
                "understanding_slot", encode.understanding_input(vae_params, pixels, cfg, dtype)
            ),
            und_images,
            encode.slots_at_once(
                rows, num_und, encode.IMAGES_AT_ONCE if cfg.und_encoder == "siglip" else through_vae
            ),
        )
    x = janusflow.place_slots(text, gen_slots, und_slots, start, task)
    x = sharding.constrain(x, "batch", None, None)
    use_repa = bool(num_gen and loss.repa_weight)
    hidden, seen, _ = run(
        "run_llm",
        x,
        batch["positions"],
        layers.make_mask(batch["segment_ids"], model.impl),
        capture=cfg.repa.layer if use_repa else 0,
    )
    sums: Sums = {name: jnp.float32(0) for name in TASKS}
    sums["ar"] = cross_entropy.summed(
        cfg.llm, params["llm"]["head"], hidden, batch["tokens"], batch["target_mask"], loss.ce_chunk
    )
    extras: dict[str, Array] = {}
    if num_gen:
        active = (task[:, :num_gen] == GENERATE).astype(jnp.float32)
        taken = janusflow.take_slots(hidden, start[:, :num_gen], cfg.num_image_tokens)
        v = run("velocity", taken.reshape(-1, *taken.shape[2:]), features, t_emb)
        v = v.reshape(velocity_target.shape)
        error = jnp.mean((v - velocity_target) ** 2, axis=(2, 3, 4))
        sums["rf"] = jnp.sum(error * active)
        extras = _by_time(error, active, draws["t"]) | {"velocity": v}
    if use_repa:
        target = batch.get("repa_target") if repa_target is None else repa_target
        if target is None:
            target = encode.over_slots(
                lambda pixels: run("siglip", encode.to_float(pixels, dtype)),
                gen_images,
                encode.slots_at_once(rows, num_gen),
            )
        seen = janusflow.take_slots(seen, start[:, :num_gen], cfg.num_image_tokens)
        similar = cosine(run("project_repa", seen), lax.stop_gradient(target))
        sums["repa"] = -jnp.sum(jnp.mean(similar, axis=-1) * active)
    return sums, extras


def _by_time(error: Array, active: Array, t: Array) -> dict[str, Array]:
    """Summed flow error and count in each quarter of time."""
    bucket = jnp.minimum((t * T_BUCKETS).astype(jnp.int32), T_BUCKETS - 1)
    here = jax.nn.one_hot(bucket, T_BUCKETS) * active[..., None]
    return {
        "rf_by_t": jnp.sum(here * error[..., None], axis=(0, 1)),
        "count_by_t": jnp.sum(here, axis=(0, 1)),
    }
