"""Operations of image generation, chat and training: useful ones, others by cause, and a count.

    python -m benchmarks.operations              # 1.3B, a minute on a CPU; nothing is computed
    python -m benchmarks.operations --size small

Every program is traced and the operations of its jaxpr are counted (`planning/flops.py`). The
useful operations are those of `training/flops.py`. `difference` compares both totals.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from janusflow_jax import config as c
from janusflow_jax.models import janusflow, llama, vae
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import flops as plan_flops, report as plan_report
from janusflow_jax.sampling import programs
from janusflow_jax.training import flops

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Line:
    """A program: its useful operations, the others by cause, and the count of its jaxpr."""

    program: str
    useful: float
    overhead: dict[str, float]
    counted: float

    @property
    def total(self) -> float:
        return self.useful + sum(self.overhead.values())

    @property
    def difference(self) -> float:
        return self.counted / self.total - 1

    def text(self) -> str:
        """As a row of a Markdown table."""
        causes = ", ".join(f"{n} {x / self.total:.1%}" for n, x in self.overhead.items() if x)
        return (
            f"| {self.program} | {self.useful / 1e12:.4g} | {self.useful / self.total:.1%} "
            f"| {causes} | {self.counted / 1e12:.4g} | {self.difference:+.2%} |"
        )


def shape(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def params_of(cfg: c.ModelConfig) -> Any:
    """The parameters as the pipeline holds them, without values."""
    shapes = janusflow.param_shapes(cfg)
    return {**shapes, "llm": jax.eval_shape(llama.unstack, shapes["llm"])}


def counted(fn: Any, *args: Any, trips: float = 1.0, **kwargs: Any) -> float:
    return plan_flops.count(fn.trace(*args, **kwargs).jaxpr, while_trips=trips)


def causal(size: int) -> float:
    return size * (size + 1) / 2


def generation(cfg: c.ModelConfig, prompt: int, padded: int, steps: int) -> Line:
    """One image with guidance; its prompt of `prompt` tokens is padded to `padded`."""
    model, slot = janusflow.JanusFlow(cfg), cfg.slot_len
    per_pair = flops.attention_per_pair(cfg)
    computed = padded**2 + steps * 2 * slot * (slot + padded)
    visible = causal(prompt) + steps * (2 * causal(slot) + slot * (prompt + 1))
    return Line(
        f"image, {steps} steps, prompt {prompt}",
        flops.image_flops(cfg, prompt, steps),
        {
            "prompt padding": 2 * flops.llm_kernel(cfg) * (padded - prompt),
            "masked attention": per_pair * (computed - visible),
        },
        counted(
            programs.sample,
            model,
            params_of(cfg),
            shape(1, padded),
            shape(1),
            shape(1, *cfg.latent_shape, dtype=jnp.float32),
            shape(dtype=jnp.float32),
            num_steps=steps,
            guided=True,
        ),
    )


def vae_decode(cfg: c.ModelConfig) -> Line:
    """Latents to pixels."""
    latents = shape(1, *cfg.latent_shape, dtype=jnp.float32)
    count = counted(programs.latents_to_pixels, cfg, "float32", vae.param_shapes(cfg.vae), latents)
    return Line("VAE decode", flops.vae_decoder(cfg), {}, count)


def prefill(cfg: c.ModelConfig, question: int, room: int) -> tuple[Line, Any]:
    """A question with one image, without SigLIP; and the state that decoding starts from.

    Args: room: tokens that the key-value cache has room for.
    """
    model, one = janusflow.JanusFlow(cfg), shape(1, 1)
    slots = shape(1, cfg.slot_len, cfg.llm.width, dtype=jnp.float32)
    args = (
        params_of(cfg),
        shape(1, question),
        slots,
        one,
        one,
        one,
        shape(1),
        shape(1, dtype=jnp.uint32),
    )
    head = 2.0 * cfg.llm.width * cfg.llm.vocab_size
    per_pair = flops.attention_per_pair(cfg)
    line = Line(
        f"prefill, {question} positions",
        2 * flops.llm_kernel(cfg) * question + per_pair * causal(question) + head,
        {
            "masked attention": per_pair * (question**2 - causal(question)),
            "unused cache": per_pair * question * room,
        },
        counted(programs.prefill, model, *args, max_new=room),
    )
    start = lambda *a: programs.prefill(model, *a, max_new=room)  # noqa: E731
    return line, jax.eval_shape(start, *args)


def decode(cfg: c.ModelConfig, question: int, room: int) -> Line:
    """All tokens that the cache has room for, one after another."""
    _, state = prefill(cfg, question, room)
    scalar = shape(dtype=jnp.float32)
    head = 2.0 * cfg.llm.width * cfg.llm.vocab_size
    per_pair = flops.attention_per_pair(cfg)
    visible = room * question + causal(room)
    return Line(
        f"decode, {room} tokens after {question} positions",
        room * (2 * flops.llm_kernel(cfg) + head) + per_pair * visible,
        {"unused cache": per_pair * (room * (question + room) - visible)},
        counted(
            programs.decode,
            janusflow.JanusFlow(cfg),
            params_of(cfg),
            state,
            scalar,
            scalar,
            trips=float(room),
            num_tokens=room,
            eos_id=-1,
        ),
    )


def training(name: str, arg: str | None) -> Line:
    """A step of a config on typical rows of its mixture."""
    cfg = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arg)
    work = plan_report.operations(cfg, sharding.make_mesh(c.MeshConfig(), jax.devices()[:1]))
    overhead = {
        "padding": work.padding,
        "masked attention (XLA's)": work.pairs,
        "idle slots": work.idle_slots,
        "head": work.head,
        "recomputation": work.recomputed,
    }
    return Line(f"training step, `{name}`", work.useful, overhead, work.jaxpr)


def lines(size: str) -> list[Line]:
    """The table."""
    cfg = c.model_config(size)
    out = [
        generation(cfg, 40, 64, 30),
        generation(cfg, 100, 128, 30),
        vae_decode(cfg),
        prefill(cfg, 768, 128)[0],
        decode(cfg, 768, 128),
    ]
    stages = ("adaptation", "pretrain", "sft") if size == "1p3b" else ()
    return out + [training(name, None) for name in stages]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--size", default="1p3b", help="test | emoji | small | 1p3b")
    print("| program | useful, TFLOP | share | overhead | counted, TFLOP | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines(p.parse_args().size):
        print(line.text(), flush=True)


if __name__ == "__main__":
    main()
