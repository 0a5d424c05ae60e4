"""The benchmark's cases. Each times our code and its peers on the same weights and inputs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import janusflow_jax
from benchmarks import models, timing
from janusflow_jax import config as c
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import parts as parts_lib
from janusflow_jax.parallel import sharding
from janusflow_jax.training import flops, init as initialization, losses, step as train_step

PEERS = ("torch, as published", "torch, prompt cached", "torch compiled, as published")


@dataclasses.dataclass
class Setup:
    """The settings of a run."""

    size: str
    ours: pathlib.Path
    published: pathlib.Path
    dtype: str
    rounds: int
    steps: int  # Euler steps
    new_tokens: int
    max_batch: int
    compiled: bool
    peers: bool

    def model(self) -> Any:
        return janusflow_jax.load(self.ours, dtype=self.dtype)

    def peer(self, compiled: bool = False) -> Any:
        from benchmarks import torch_peer

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        return torch_peer.TorchPeer(
            str(self.published), str(self.published / "vae"), device, self.dtype, compiled
        )


@dataclasses.dataclass
class Result:
    """The times of every implementation for one case, and the least work that it needs."""

    case: str
    unit: str  # 'images', 'tokens', ...
    units: float  # that one run produces
    ways: dict[str, timing.Timing]  # by implementation
    tflop: float = 0.0  # useful operations
    gbytes: float = 0.0  # to be read at least
    note: str = ""  # whether the results agree


def matmul(s: Setup) -> Iterator[Result]:
    """The speed of the machine in both libraries: [n, n] x [n, n]."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = np.random.default_rng(0).standard_normal((n, n), np.float32)
    a = jnp.asarray(x, s.dtype)
    run = jax.jit(lambda a: a @ a)
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: run(a)}
    if s.peers:
        import torch

        b = torch.from_numpy(x).to(getattr(torch, s.dtype))
        if jax.default_backend() == "gpu":
            b = b.cuda()

        def theirs() -> None:
            _ = b @ b
            if b.is_cuda:
                torch.cuda.synchronize()

        ways["torch"] = theirs
    yield Result(
        f"matmul {n}", "matmuls", 1, timing.alternate(ways, 2 * s.rounds + 4), 2e-12 * n**3
    )


def generate(s: Setup) -> Iterator[Result]:
    """Latency of one image (latents, guidance 2) by the length of the prompt."""
    model, peer = s.model(), s.peer() if s.peers else None
    fast = s.peer(compiled=True) if s.peers and s.compiled else None
    for length in (16, 100, 300):
        yield _generate(s, model, peer, fast, length, 1)


def generate_batches(s: Setup) -> Iterator[Result]:
    """Throughput of batches of 1, 2, 4, ... images with prompts of 40 tokens."""
    model, peer = s.model(), s.peer() if s.peers else None
    batch = 1
    while batch <= s.max_batch:
        yield _generate(s, model, peer, None, 40, batch)
        batch *= 2


def _generate(s: Setup, model: Any, peer: Any, fast: Any, length: int, batch: int) -> Result:
    cfg = model.cfg
    ids = models.prompt(cfg, length)
    model.text = models.FixedText(ids)
    noise = np.random.default_rng(1).standard_normal((batch, *cfg.latent_shape), np.float32)
    options = {"num_steps": s.steps, "noise": noise, "output": "latent"}
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: model.generate(["x"] * batch, **options)}
    rows = np.stack([ids] * batch)
    if peer:
        ways[PEERS[0]] = lambda: peer.generate(rows, noise, s.steps, 2.0, cached=False)
        ways[PEERS[1]] = lambda: peer.generate(rows, noise, s.steps, 2.0, cached=True)
    if fast:
        ways[PEERS[2]] = lambda: fast.generate(rows, noise, s.steps, 2.0, cached=False)
    note = ""
    if peer:
        theirs, ours = ways[PEERS[0]](), ways["ours"]()
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        note = f"largest difference {error:.0e}"
    work = batch * flops.image_flops(cfg, length, s.steps)
    case = f"image, {s.steps} steps, prompt {length}, batch {batch}"
    return Result(case, "images", batch, timing.alternate(ways, s.rounds), work / 1e12, note=note)


def decode_latents(s: Setup) -> Iterator[Result]:
    """The VAE's decoder on one image."""
    model, peer = s.model(), s.peer() if s.peers else None
    z = np.random.default_rng(1).standard_normal((1, *model.cfg.latent_shape), np.float32)
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: model.decode_latents(z, "numpy")}
    if peer:
        ways["torch"] = lambda: peer.decode_latents(z)
    work = flops.vae_decoder(model.cfg) / 1e12
    yield Result("VAE decode", "images", 1, timing.alternate(ways, s.rounds), work)


def chat(s: Setup) -> Iterator[Result]:
    """Tokens per second after a prompt of 64 tokens; the first token about an image."""
    model, peer = s.model(), s.peer() if s.peers else None
    fast = s.peer(compiled=True) if s.peers and s.compiled else None
    cfg = model.cfg
    for batch in sorted({1, min(16, max(s.max_batch, 4))}):
        ids = models.prompt(cfg, 64)
        model.text = models.FixedText(ids)
        ours = lambda b=batch: model.chat(  # noqa: E731
            ["x"] * b, [[]] * b, max_new_tokens=s.new_tokens
        )
        ways: dict[str, Callable[[], Any]] = {"ours": ours}
        rows = np.stack([ids] * batch)
        note = ""
        if peer:
            ways["torch, prompt cached"] = lambda r=rows: peer.chat(r, None, s.new_tokens)
            theirs = " ".join(map(str, peer.chat(rows, None, s.new_tokens)[0]))
            note = "same tokens" if ours()[0] == theirs else "OTHER TOKENS"
        if fast:
            ways["torch compiled"] = lambda r=rows: fast.chat(r, None, s.new_tokens)
        weights = flops.llm_kernel(cfg) + cfg.llm.width * cfg.llm.vocab_size
        size = 2 if s.dtype == "bfloat16" else 4
        yield Result(
            f"{s.new_tokens} tokens after 64, batch {batch}",
            "tokens",
            batch * s.new_tokens,
            timing.alternate(ways, s.rounds),
            2e-12 * weights * batch * (s.new_tokens + 64),
            gbytes=weights * size * s.new_tokens / 1e9,
            note=note,
        )
    yield _first_token(s, model, peer)


def _first_token(s: Setup, model: Any, peer: Any) -> Result:
    cfg, at = model.cfg, 32
    ids = models.prompt(cfg, at + cfg.slot_len + 31)
    model.text = models.FixedText(ids, at)
    side = cfg.image_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: model.chat("x", [image], max_new_tokens=1)
    }
    if peer:
        pixels = image[None].astype(np.float32) / 127.5 - 1
        ways["torch"] = lambda: peer.chat(ids[None], (pixels, at), 1)
    work = flops.siglip(cfg) + 2.0 * flops.llm_kernel(cfg) * len(ids)
    work += flops.attention_per_pair(cfg) * len(ids) ** 2 / 2
    case = f"first token about an image, {len(ids)} positions"
    return Result(case, "answers", 1, timing.alternate(ways, s.rounds), work / 1e12)


def train_steps(s: Setup) -> Iterator[Result]:
    """One optimizer step (AR + RF, SigLIP and VAE frozen, no remat, no EMA) on one packed row."""
    on_cpu = jax.default_backend() == "cpu"
    mixed = "ggu" if on_cpu else "gggggu"
    for name, tasks, text in (
        ("understanding sample", "u", 200),
        ("generation sample", "g", 80),
        ("packed", mixed, 80),
    ):
        yield _train(s, name, tasks, text)


def _train(s: Setup, name: str, tasks: str, text: int) -> Result:
    model = c.model_config(s.size)
    batch, gen, und = models.rows(model, tasks, text)
    parts = tuple(p for p in c.MODEL_PARTS if p != "und_encoder")
    cfg = c.TrainConfig(
        model=model,
        data=c.DataConfig(
            sources=(c.SourceConfig(name="rows"),),
            row_len=batch["tokens"].shape[1],
            gen_slots=gen,
            und_slots=und,
        ),
        loss=c.LossConfig(repa_weight=0.0),
        optim=c.OptimConfig(warmup_steps=1, ema=0.0),
        train_parts=parts,
        batch_rows=1,
        dtype=s.dtype,
        remat="none" if jax.default_backend() == "cpu" else "full",
    )
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    loaded = model_folder.load_model(s.ours)
    with jax.set_mesh(mesh):
        params = {**(loaded.params or {}), "repa_head": {}}  # REPA is off
        state = {"state": initialization.create_state(cfg, mesh, params, loaded.vae)}
        put = sharding.put_batch(batch, mesh, 1)
        step = train_step.jit_train_step(cfg, mesh, state["state"], put)

    def ours() -> Any:
        with jax.set_mesh(mesh):
            state["state"], out = step(state["state"], put)
        return out

    ways: dict[str, Callable[[], Any]] = {"ours": ours}
    note = ""
    if s.peers:
        from benchmarks import torch_peer

        trainer = torch_peer.TorchTrainer(s.peer())
        draws = jax.device_get(losses.draw(jax.random.key(cfg.seed), put, model, cfg.loss, gen))
        ways["torch"] = lambda: trainer.step(batch, gen, und, draws)
        own, theirs = float(ours()["loss"]), ways["torch"]()
        note = f"first losses {own:.4f}, {theirs:.4f}"
    work = flops.count(batch, gen, und).flops(model, set(parts_lib.trained_paths(cfg)), False)
    positions = int((batch["segment_ids"] > 0).sum())
    case = f"train: {name}, {positions} positions"
    return Result(case, "rows", 1, timing.alternate(ways, s.rounds), work / 1e12, note=note)


def first_image(s: Setup) -> Iterator[Result]:
    """New processes: the import, and the time to the first image (cold cache first, then warm)."""
    run = _process("import janusflow_jax.pipeline")  # which `load` imports
    yield Result("import", "starts", 1, timing.alternate({"ours": run}, s.rounds))
    code = f"""
import janusflow_jax
model = janusflow_jax.load({str(s.ours)!r}, dtype={s.dtype!r})
model.generate("a red apple", num_steps={s.steps})
"""
    with tempfile.TemporaryDirectory() as cache:
        run = _process(code, JANUSFLOW_COMPILATION_CACHE=cache)
        times = timing.alternate({"ours": run}, s.rounds)["ours"]
    case = f"start to first image, {s.steps} steps, warm cache"
    yield Result(case, "starts", 1, {"ours": times}, note="the first run has a cold cache")


def _process(code: str, **env: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, check=True)

    return run


CASES: dict[str, Callable[[Setup], Iterator[Result]]] = {
    "matmul": matmul,
    "generate": generate,
    "generate_batches": generate_batches,
    "vae": decode_latents,
    "chat": chat,
    "train": train_steps,
    "start": first_image,
}
