"""The training objective: AR + RF + REPA as sums and counts, and its random draws.

Source: arXiv 2411.07975 sections 3.2 and 3.3. Drawing and computing are apart: `draw` is keyed by
(seed, row, slot), so the numbers of a row do not depend on its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.config import GENERATE, NONE, LossConfig, ModelConfig
from janusflow_jax.models import attention, encode, janusflow, layers
from janusflow_jax.parallel import sharding
from janusflow_jax.sampling import flow
from janusflow_jax.training import cross_entropy

Batch = dict[str, Array]
Sums = dict[str, Array]
Apply = Callable[..., Any]
"""(method, *arguments) -> its result, of the model with its parameters."""
TASKS = ("ar", "rf", "repa")
T_BUCKETS = 4


def draw(key: Array, batch: Batch, cfg: ModelConfig, loss: LossConfig, num_gen: int) -> Batch:
    """Times, noise and posterior samples of every generation slot.

    Args:
      key: of the run.
      batch: needs `row` uint32[B].
      num_gen: number of generation slots, Kg.
    Returns:
      t float32[B, Kg]; noise and posterior float32[B, Kg, h, w, C]; for a student also r
      float32[B, Kg], the ends of the intervals that begin at t.
    """

    def draw_slot(row: Array, slot: Array) -> Batch:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row), slot), 3)
        if cfg.student.steps:
            t, r = flow.sample_interval(keys[0], loss.time, loss.time_shift)
            times = {"t": t, "r": r}
        else:
            times = {"t": flow.sample_time(keys[0], loss.time, loss.time_shift)}
        return {
            **times,
            "noise": jax.random.normal(keys[1], cfg.latent_shape, jnp.float32),
            "posterior": jax.random.normal(keys[2], cfg.latent_shape, jnp.float32),
        }

    slots = jnp.arange(num_gen)
    return jax.vmap(lambda row: jax.vmap(lambda slot: draw_slot(row, slot))(slots))(batch["row"])


def counts(batch: Batch, num_gen: int, num_sources: int = 1) -> Sums:
    """What the losses of each task and source are means of: target tokens, or generation slots.

    Args:
      num_sources: of the mixture, S; 1: all rows count as one source.
    Returns:
      {'ar', 'rf', 'repa'}, each float32[S].
    """
    targets, slots = _source_ids(batch, num_gen, num_sources)
    active = batch["slot_task"][:, :num_gen] == GENERATE
    tokens = cross_entropy.sum_by_source(batch["target_mask"], targets, num_sources)
    images = cross_entropy.sum_by_source(active, slots, num_sources)
    return {"ar": tokens, "rf": images, "repa": images}


def weights(
    loss: LossConfig, totals: Sums, shares: Float[Array, " S"], generates: Sequence[bool]
) -> Sums:
    """Factor of each source's part of each task's sum in the loss, by `loss.norm`.

    per_task: a task's loss is the mean over its targets, whatever their source.
    per_sample: the same mean, times the task's share of the mixture.
    mixture: the means of the sources, each times the source's share of the mixture.

    Args:
      totals: of `counts`, over the whole batch.
      shares: of the mixture, by source; they sum to 1.
      generates: which sources have images to generate.
    Returns:
      {'ar', 'rf', 'repa'}, each float32[S].
    """
    generate = jnp.sum(jnp.where(jnp.array(generates), shares, 0))
    task_share = {"ar": 1 - generate, "rf": generate, "repa": generate}
    weight = {"ar": loss.ar_weight, "rf": loss.rf_weight, "repa": loss.repa_weight}
    out = {}
    for task, total in totals.items():
        if loss.norm == "mixture":
            scale = shares / jnp.maximum(total, 1.0)
        else:
            share = task_share[task] if loss.norm == "per_sample" else 1.0
            scale = jnp.broadcast_to(share / jnp.maximum(jnp.sum(total), 1.0), total.shape)
        out[task] = weight[task] * scale
    return out


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
    source_weights: Sums | None = None,
    teacher: Any = None,
) -> tuple[Sums, dict[str, Any]]:
    """One forward pass over packed rows: the summed losses of the three tasks.

    With a teacher the RF loss is that of its student (docs/few_steps.md).

    Args:
      batch: rows and slots with images uint8[B, K, H, W, 3]. From a cache it may hold latent_mean
        and latent_logvar, repa_target or und_features, which replace their encoder.
      draws: of `draw`.
      num_gen, num_und: Kg and Ku; generation uses slots[:Kg], understanding slots[-Ku:].
      source_weights: of `weights`; None: 1, and all rows count as one source.
      teacher: parameters; None: the RF loss is that of the flow.
    Returns:
      sums {'ar', 'rf', 'repa'}, weighted; extras: `by_source` (the sums float32[S] of each task
      without weights and gradient), flow error and count by time, predicted velocity.
    """
    cfg = model.cfg
    factors = source_weights or dict.fromkeys(TASKS, jnp.ones(1))
    num_sources = len(factors["ar"])
    target_sources, slot_sources = _source_ids(batch, num_gen, num_sources)
    slot_task, start = batch["slot_task"], batch["slot_start"]

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    # Images become the vectors of their slots: noisy latents to generate, features to understand.
    gen: Any = None
    und: Any = None
    und_features: Any = None
    if num_gen:
        x = _latents(vae_params, batch, draws, cfg, loss, model.dtype)
        z = flow.interpolate(x, draws["noise"], draws["t"])
        gen, features, t_emb = _generation_slots(run, z, draws["t"])
    if num_und and cfg.und_encoder == "siglip":
        und_features = _siglip_features(run, batch, num_und, model.dtype)
        slots = run("features_slot", _merge_slots(und_features))
        und = slots.reshape(*und_features.shape[:2], *slots.shape[1:])
    elif num_und:
        und = _latent_understanding_slots(run, vae_params, batch, num_und, cfg, model.dtype)

    # One pass of the LLM over text and slots serves both tasks.
    use_repa = bool(num_gen and loss.repa_weight)
    row = janusflow.place_slots(run("embed_tokens", batch["tokens"]), gen, und, start, slot_task)
    hidden, middle, _ = run(
        "run_llm",
        sharding.constrain(row, "batch", None, None),
        batch["positions"],
        attention.row_mask(batch["segment_ids"], model.impl),
        capture=cfg.repa.layer if use_repa else 0,
    )

    # AR: cross-entropy of the next token.
    sums: Sums = {task: jnp.float32(0) for task in TASKS}
    by_source = {task: jnp.zeros(num_sources) for task in TASKS}
    sums["ar"], by_source["ar"] = cross_entropy.summed(
        params["llm"]["head"]["kernel"],
        hidden,
        batch["tokens"],
        batch["target_mask"],
        target_sources,
        factors["ar"],
        loss.ce_chunk,
    )
    extras: dict[str, Any] = {"by_source": by_source}
    if not num_gen:
        return sums, extras
    active = (slot_task[:, :num_gen] == GENERATE).astype(jnp.float32)

    def add_slots(task: str, values: Array) -> None:
        summed = cross_entropy.sum_by_source(values, slot_sources, num_sources)
        by_source[task] = lax.stop_gradient(summed)
        sums[task] = jnp.sum(factors[task][slot_sources] * values)

    def at_slots(states: Array) -> Array:
        return janusflow.gather_slots(states, start[:, :num_gen], cfg.num_image_tokens)

    # RF: squared error of the velocity.
    states = _merge_slots(at_slots(hidden))
    if teacher is None:
        v = run("velocity", states, features, t_emb).reshape(x.shape)
        target = x - draws["noise"]
    else:
        held = jax.tree.map(lax.stop_gradient, (params, states, features))

        def average(inputs: tuple[Any, Array, Array], r: Array) -> Array:
            """The student's average velocity from t to r. The LLM knows t only."""
            tree, *slots = inputs
            end = model.apply({"params": tree}, _merge_slots(r), method="embed_time")
            return model.apply({"params": tree}, *slots, end, method="velocity").reshape(x.shape)

        v = average((params, states, features), draws["r"])
        target = flow.lagrangian_target(
            functools.partial(average, held),
            functools.partial(_guided, model, teacher, batch),
            z,
            draws["t"],
            draws["r"],
        )
    error = jnp.mean((v - lax.stop_gradient(target)) ** 2, axis=(2, 3, 4))
    add_slots("rf", error * active)
    extras |= _by_time(error, active, draws["t"]) | {"velocity": v}

    # REPA: states in the middle of the LLM align with SigLIP features of the clean image.
    if use_repa:
        is_shared = cfg.repa_target != "siglip" and "und_features" not in batch
        clean = _repa_target(run, batch, num_gen, und_features if is_shared else None, model.dtype)
        similarity = cosine(run("project_repa", at_slots(middle)), clean)
        add_slots("repa", -jnp.mean(similarity, axis=-1) * active)
    return sums, extras


def _source_ids(batch: Batch, num_gen: int, num_sources: int) -> tuple[Array, Array]:
    """The source of each position [B, T] and of each generation slot [B, Kg]."""
    if num_sources == 1:
        return jnp.zeros_like(batch["tokens"]), jnp.zeros_like(batch["slot_task"][:, :num_gen])
    ids = batch["source_ids"]
    return ids, jnp.take_along_axis(ids, batch["slot_start"][:, :num_gen], axis=1)


def _merge_slots(x: Array) -> Array:
    """[B, G, ...] -> [B x G, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _latents(
    vae_params: Any, batch: Batch, draws: Batch, cfg: ModelConfig, loss: LossConfig, dtype: Any
) -> Float[Array, "B G h w C"]:
    """Scaled latents of the generation slots, by the VAE or from its cache."""
    noise = None if loss.vae_mode else draws["posterior"]
    if "latent_mean" in batch:
        return encode.scaled_latents(batch["latent_mean"], batch["latent_logvar"], noise, cfg)
    images = batch["images"][:, : draws["t"].shape[1]]
    return encode.encode_latents(vae_params, images, noise, cfg, dtype)


def _guided(
    model: janusflow.JanusFlow,
    params: Any,
    batch: Batch,
    z: Float[Array, "B G h w C"],
    t: Float[Array, "B G"],
) -> Float[Array, "B G h w C"]:
    """The guided velocity of the generation slots of packed rows, at the student's guidance."""

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    start = batch["slot_start"]
    task = jnp.where(batch["slot_task"] == GENERATE, GENERATE, NONE)
    gen, features, t_emb = _generation_slots(run, z, t)
    row = janusflow.place_slots(run("embed_tokens", batch["tokens"]), gen, None, start, task)
    row = sharding.constrain(row, "batch", None, None)

    def branch(segment_ids: Array) -> Array:
        mask = attention.row_mask(segment_ids, model.impl)
        hidden, _, _ = run("run_llm", row, batch["positions"], mask)
        states = janusflow.gather_slots(hidden, start[:, : z.shape[1]], model.cfg.num_image_tokens)
        return run("velocity", _merge_slots(states), features, t_emb).reshape(z.shape)

    scale = model.cfg.student.guidance_scale
    cond = branch(batch["segment_ids"])
    return flow.guide(cond, None if scale == 1 else branch(batch["unprompted_ids"]), scale)


def _generation_slots(run: Apply, z: Array, t: Array) -> tuple[Array, Array, Array]:
    """Vectors [B, G, S, D] of noisy latents; features and time embedding [B x G, ...]."""
    slots, features, t_emb = run("generation_slot", _merge_slots(z), _merge_slots(t))
    return slots.reshape(*z.shape[:2], *slots.shape[1:]), features, t_emb


def _siglip_features(run: Apply, batch: Batch, num_und: int, dtype: Any) -> Float[Array, "B U S E"]:
    """Features of the understanding slots, by SigLIP or from its cache."""
    if "und_features" in batch:
        return batch["und_features"].astype(dtype)
    return _over_images(run, "understanding_features", batch["images"][:, -num_und:], dtype)


def _latent_understanding_slots(
    run: Apply, vae_params: Any, batch: Batch, num_und: int, cfg: ModelConfig, dtype: Any
) -> Float[Array, "B U S D"]:
    """Vectors of the understanding slots, by an encoder of VAE latents."""

    def understand(pixels: Array) -> Array:
        x = encode.understanding_input(vae_params, pixels, cfg, dtype)
        return run("understanding_slot", x)

    most = encode.PIXELS_AT_ONCE // cfg.image_size**2
    images = batch["images"][:, -num_und:]
    return encode.over_slots(understand, images, encode.slots_at_once(len(images), num_und, most))


def _repa_target(
    run: Apply, batch: Batch, num_gen: int, und_features: Array | None, dtype: Any
) -> Float[Array, "B G S E"]:
    """SigLIP features of the clean images, by SigLIP or from its cache; no gradient.

    Args: und_features: features [B, U, S, E] of the last slots, which understanding has computed.
    """
    if "repa_target" in batch:
        return lax.stop_gradient(batch["repa_target"])
    images, features = batch["images"], []
    known = 0 if und_features is None else und_features.shape[1]
    if others := min(num_gen, images.shape[1] - known):
        features.append(_over_images(run, "siglip", images[:, :others], dtype))
    if und_features is not None:
        features.append(und_features)
    return lax.stop_gradient(jnp.concatenate(features, axis=1)[:, :num_gen])


def _over_images(run: Apply, method: str, images: Array, dtype: Any) -> Float[Array, "B K S E"]:
    return encode.over_slots(
        lambda pixels: run(method, encode.to_float(pixels, dtype)),
        images,
        encode.slots_at_once(*images.shape[:2]),
    )


def cosine(a: Float[Array, "*b D"], b: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """Cosine similarity in float32; 0 with a finite gradient where either side is zero.

    The gradient of optax's is NaN there.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    scale = layers.safe_norm(a, -1, keepdims=False) * layers.safe_norm(b, -1, keepdims=False)
    return jnp.sum(a * b, axis=-1) / jnp.where(scale == 0, 1.0, scale)


def _by_time(error: Array, active: Array, t: Array) -> dict[str, Array]:
    """Summed flow error and count in each quarter of time."""
    bucket = jnp.minimum((t * T_BUCKETS).astype(jnp.int32), T_BUCKETS - 1)
    one_hot = jax.nn.one_hot(bucket, T_BUCKETS) * active[..., None]
    return {
        "rf_by_t": jnp.sum(one_hot * error[..., None], axis=(0, 1)),
        "count_by_t": jnp.sum(one_hot, axis=(0, 1)),
    }
