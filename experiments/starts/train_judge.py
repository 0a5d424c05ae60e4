"""Trains the judge of the suite `emoji` on OpenMoji, and saves it as a start.

    python experiments/starts/train_judge.py --data data/openmoji --out starts/emoji_judge

An image tower (SigLIP's module, fresh) and a text tower (embeddings of class and colour under an
MLP) learn one space: of all 1,864 pairs' texts, a picture's own must be nearest (softmax). It sees
every pair, held-out ones too, in views that the test splits do not have, half of them as the quick
start's VAE gives them back, and blurred, shifted and noisy, because that is how painted pictures
look. It never sees a painted picture, nor the SigLIP that REPA aligns with.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from janusflow_jax import cli, config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.data import images, sources
from janusflow_jax.models import encode, vae
from janusflow_jax.openmoji import (
    build as openmoji_build,
    judge,
    prompts as openmoji_prompts,
    scores as emoji,
)
from janusflow_jax.training import optim

EMA = 0.995
SHIFT = 4  # pixels
TEST_VIEW = "-1"  # this view of a held-out pair is for testing


def load(data: str, split: str, size: int) -> tuple[np.ndarray, list[emoji.Label], list[str]]:
    """All pictures of a split, uint8[N, size, size, 3], their labels and ids."""
    source = sources.open_source(data, split)
    records = [source[i] for i in range(len(source))]
    pictures = [images.for_generation(images.decode(r["image"]), size) for r in records]
    labels = [emoji.Label(r["class"], r["colour"]) for r in records]
    return np.stack(pictures), labels, [r["id"] for r in records]


def round_trip(path: str, pictures: np.ndarray) -> np.ndarray:
    """Pictures as the VAE gives them back, uint8."""
    loaded = model_folder.load_model(path)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loaded.vae)
    run = jax.jit(lambda p, x: vae.Vae(loaded.cfg.vae).apply({"params": p}, x))
    out = []
    for i in range(0, len(pictures), 32):
        x = np.pad(pictures[i : i + 32], ((0, max(0, i + 32 - len(pictures))), *[(0, 0)] * 3))
        y = jnp.clip(run(params, encode.to_float(jnp.asarray(x), jnp.float32)), -1, 1)
        out.append(np.asarray(jnp.round((y + 1) * 127.5)).astype(np.uint8))
    return np.concatenate(out)[: len(pictures)]


def augment(key: jax.Array, x: jax.Array) -> jax.Array:
    """Shifts, blurs half of the pictures, changes contrast and colours a little, adds noise.

    x: float32[B, H, W, 3] in [-1, 1].
    """
    keys = jax.random.split(key, 6)
    b, side = len(x), x.shape[1]
    padded = jnp.pad(x, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=1.0)
    place = jax.random.randint(keys[0], (b, 2), 0, 2 * SHIFT + 1)
    cut = lambda p, at: jax.lax.dynamic_slice(p, (at[0], at[1], 0), (side, side, 3))  # noqa: E731
    x = jax.vmap(cut)(padded, place)
    each = (b, 1, 1, 1)
    x = jnp.where(jax.random.bernoulli(keys[1], 0.5, each), blurred(x), x)
    gain = jax.random.uniform(keys[2], (b, 1, 1, 3), minval=0.85, maxval=1.1)
    x = 1 - (1 - x) * gain  # white stays white
    x = jnp.where(jax.random.bernoulli(keys[3], 0.5, each), x[:, :, ::-1], x)
    sigma = jax.random.uniform(keys[4], each, maxval=0.15)
    return jnp.clip(x + sigma * jax.random.normal(keys[5], x.shape), -1, 1)


def blurred(x: jax.Array) -> jax.Array:
    """Binomial over 3 x 3 pixels, white outside."""
    p = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    p = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 4
    return (p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]) / 4


def accuracy(loaded: judge.LoadedJudge, pictures: np.ndarray, labels: list[emoji.Label]) -> Any:
    """How often the nearest of all texts is the picture's; has its class; has its colour."""
    every = loaded.cfg.labels
    likeness = loaded.embed_images(list(pictures)) @ loaded.embed_texts(every).T
    said = [every[i] for i in likeness.argmax(1)]
    pairs = list(zip(said, labels, strict=True))
    return {
        "pictures": len(labels),
        "candidates": len(every),
        "pair": round(float(np.mean([a == b for a, b in pairs])), 4),
        "class": round(float(np.mean([a.name == b.name for a, b in pairs])), 4),
        "colour": round(float(np.mean([a.color == b.color for a, b in pairs])), 4),
    }


def train(
    cfg: judge.JudgeConfig,
    args: argparse.Namespace,
    views: tuple[np.ndarray, np.ndarray],
    labels: list[emoji.Label],
) -> Any:
    """Parameters (their running mean) after `args.steps` steps.

    Args: views: the pictures as drawn, and as the VAE gives them back, uint8[N, H, W, 3].
    """
    classes, colours = judge.label_indices(cfg, cfg.labels)
    own_class, own_colour = judge.label_indices(cfg, labels)
    target = own_class * len(cfg.colors) + own_colour
    key = jax.random.key(args.seed)
    params = judge.init_params(cfg, key)
    options = c.OptimConfig(
        name="muon",
        lr=args.lr,
        b2=0.99,
        warmup_steps=50,
        decay_steps=args.steps // 2,
        weight_decay=0.05,
    )
    tx = optim.make_optimizer(options, args.steps)

    def loss_fn(params: Any, x: jax.Array, want: jax.Array) -> Any:
        scores = judge.Judge(cfg).apply({"params": params}, x, classes, colours)
        right = jnp.mean(jnp.argmax(scores, axis=-1) == want)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, want)), right

    @jax.jit
    def step(params: Any, ema: Any, opt: Any, x: jax.Array, want: jax.Array, n: jax.Array) -> Any:
        x = augment(jax.random.fold_in(key, n), encode.to_float(x, jnp.float32))
        (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, want)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return params, optim.update_ema(ema, params, EMA, n), opt, (loss, right)

    ema, opt = params, tx.init(params)
    rng, count = np.random.default_rng(args.seed), len(labels)
    order = np.concatenate(
        [rng.permutation(count) for _ in range(args.steps * args.batch // count + 1)]
    )
    began = time.time()
    for n in range(args.steps):
        pick = order[n * args.batch : (n + 1) * args.batch]
        painted = rng.random(len(pick)) < 0.5
        x = np.where(painted[:, None, None, None], views[1][pick], views[0][pick])
        params, ema, opt, (loss, right) = step(params, ema, opt, x, target[pick], jnp.int32(n))
        if (n + 1) % 100 == 0 or n == 0:
            left = (time.time() - began) / (n + 1) * (args.steps - n - 1) / 60
            print(
                f"step {n + 1}/{args.steps} loss {float(loss):.3f} right {float(right):.2f} "
                f"{left:.1f} min left",
                flush=True,
            )
    return ema


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="data/openmoji")
    p.add_argument("--vae", default="starts/emoji_vae")
    p.add_argument("--out", default=judge.START)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--patch", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true")
    args = p.parse_args(argv)
    out = epath.Path(args.out)
    if out.exists() and not args.overwrite:
        raise CheckpointError(f"{out}: exists; choose another path or pass --overwrite")
    began = time.time()
    tower = c.SiglipConfig(
        image_size=64,
        patch_size=args.patch,
        width=96,
        num_layers=args.layers,
        num_heads=3,
        mlp_width=384,
    )
    pictures, labels, _ = load(args.data, "train", tower.image_size)
    pairs, pair_labels, ids = load(args.data, "heldout_pairs", tower.image_size)
    known = np.array([not x.endswith(TEST_VIEW) for x in ids])
    pictures = np.concatenate([pictures, pairs[known]])
    labels += [x for x, k in zip(pair_labels, known, strict=True) if k]
    cfg = judge.JudgeConfig(
        image=tower,
        classes=tuple(sorted({x.name for x in labels})),
        colors=tuple(openmoji_prompts.PALETTE),
    )
    print(f"{len(labels)} pictures of {len(set(labels))} pairs", flush=True)
    again = round_trip(args.vae, pictures)
    print(f"as the VAE gives them back: {time.time() - began:.0f} s", flush=True)
    params = train(cfg, args, (pictures, again), labels)
    judge.save(out, cfg, params, {})
    loaded = judge.load(out)  # scored as shipped, in bfloat16
    views, view_labels, _ = load(args.data, "heldout_views", tower.image_size)
    new = [x for x, k in zip(pair_labels, known, strict=True) if not k]
    soft = np.asarray(
        jnp.round((blurred(encode.to_float(jnp.asarray(views), jnp.float32)) + 1) * 127.5)
    )
    scores = {
        "heldout_views": accuracy(loaded, views, view_labels),
        "heldout_views, VAE": accuracy(loaded, round_trip(args.vae, views), view_labels),
        "heldout_views, blurred": accuracy(loaded, soft.astype(np.uint8), view_labels),
        "heldout_pairs, a view of its own": accuracy(loaded, pairs[~known], new),
    }
    for name, score in scores.items():
        print(f"{name}: {score}", flush=True)
    options = f"--steps {args.steps} --batch {args.batch} --lr {args.lr} --layers {args.layers}"
    options += f" --patch {args.patch} --seed {args.seed}"
    command = f"python experiments/starts/train_judge.py {options} --out {judge.START}"
    judge.save(out, cfg, params, {"made_by": command, "accuracy": scores})
    notice = openmoji_build.JUDGE_NOTICE.format(command=command)
    (out / "README.md").write_text(notice)
    print(f"saved to {out} after {(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    cli.run(main)
