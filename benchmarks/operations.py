"""Operations of painting, reading, answering and training: wanted, wasted and what programs do.

    python -m benchmarks.operations              # 1.3B, a minute on a CPU; nothing is computed
    python -m benchmarks.operations --size small

Every program is traced and its jaxpr counted (`plan_flops.count`); beside it stands what is wanted
by `flops.py` and, by name, what is done besides. `difference` is how far both counts are apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from janusflow_jax import config as c, pipeline
from janusflow_jax.models import janusflow, llama, vae
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import flops as plan_flops, report as plan_report
from janusflow_jax.training import flops

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Line:
    """A program: operations wanted, those done besides by name, those counted on its jaxpr."""

    what: str
    wanted: float
    wasted: dict[str, float]
    counted: float

    @property
    def difference(self) -> float:
        return self.counted / (self.wanted + sum(self.wasted.values())) - 1

    def text(self) -> str:
        """As a row of a Markdown table."""
        total = self.wanted + sum(self.wasted.values())
        named = ", ".join(f"{n} {x / total:.1%}" for n, x in self.wasted.items() if x)
        return (
            f"| {self.what} | {self.wanted / 1e12:.4g} | {self.wanted / total:.1%} | {named} "
            f"| {self.counted / 1e12:.4g} | {self.difference:+.2%} |"
        )


def shape(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def params_of(cfg: c.ModelConfig) -> Any:
    """The parameters as the pipeline holds them, without numbers."""
    shapes = janusflow.param_shapes(cfg)
    return {**shapes, "llm": jax.eval_shape(llama.unstack, shapes["llm"])}


def counted(fn: Any, *args: Any, trips: float = 1.0, **kwargs: Any) -> float:
    return plan_flops.count(fn.trace(*args, **kwargs).jaxpr, while_trips=trips)


def causal(size: int) -> float:
    return size * (size + 1) / 2


def painting(cfg: c.ModelConfig, prompt: int, padded: int, steps: int) -> Line:
    """One picture with guidance; its prompt of `prompt` tokens is padded to `padded`."""
    model, slot = janusflow.JanusFlow(cfg), cfg.slot_len
    per_pair = flops.attention_per_pair(cfg)
    asked = flops.image_flops(cfg, prompt, steps)["all"]
    rectangle = padded**2 + steps * 2 * slot * (slot + padded)
    needed = causal(prompt) + steps * (2 * causal(slot) + slot * (prompt + 1))
    return Line(
        f"painting, {steps} steps, prompt {prompt}",
        asked,
        {
            "padding of the prompt": 2 * flops.llm_kernel(cfg) * (padded - prompt),
            "pairs that do not see each other": per_pair * (rectangle - needed),
        },
        counted(
            pipeline._sample,
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


def decoding(cfg: c.ModelConfig) -> Line:
    """A picture's latents to pixels."""
    latents = shape(1, *cfg.latent_shape, dtype=jnp.float32)
    done = counted(pipeline._decode_vae, cfg, "float32", vae.param_shapes(cfg.vae), latents)
    return Line("VAE decode", flops.vae_decoder(cfg), {}, done)


def reading(cfg: c.ModelConfig, question: int, room: int) -> tuple[Line, Any]:
    """A question with one picture, SigLIP apart; and the state that answering goes on from."""
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
        f"a question of {question} positions",
        2 * flops.llm_kernel(cfg) * question + per_pair * causal(question) + head,
        {
            "pairs that do not see each other": per_pair * (question**2 - causal(question)),
            "the answer's free room": per_pair * question * room,
        },
        counted(pipeline._start, model, *args, max_new=room),
    )
    start = lambda *a: pipeline._start(model, *a, max_new=room)  # noqa: E731
    return line, jax.eval_shape(start, *args)


def answering(cfg: c.ModelConfig, question: int, room: int) -> Line:
    """All tokens that the room holds, one after another."""
    _, state = reading(cfg, question, room)
    number = shape(dtype=jnp.float32)
    head = 2.0 * cfg.llm.width * cfg.llm.vocab_size
    per_pair = flops.attention_per_pair(cfg)
    seen = room * question + causal(room)
    return Line(
        f"{room} tokens of an answer to {question} positions",
        room * (2 * flops.llm_kernel(cfg) + head) + per_pair * seen,
        {"free room of the buffer": per_pair * (room * (question + room) - seen)},
        counted(
            pipeline._advance,
            janusflow.JanusFlow(cfg),
            params_of(cfg),
            state,
            number,
            number,
            trips=float(room),
            num_tokens=room,
            eos_id=-1,
        ),
    )


def training(name: str, arg: str | None) -> Line:
    """A step of a config, with the rows that its mixture has in the mean."""
    cfg = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arg)
    work = plan_report.operations(cfg, sharding.make_mesh(c.MeshConfig(), jax.devices()[:1]))
    wasted = {
        "padding": work.padding,
        "pairs that do not see each other (XLA's form)": work.pairs,
        "idle slots": work.idle_slots,
        "head": work.head,
        "recomputation": work.recomputed,
    }
    return Line(f"training step, `{name}`", work.useful, wasted, work.jaxpr)


def lines(size: str) -> list[Line]:
    """The table."""
    cfg = c.model_config(size)
    out = [
        painting(cfg, 40, 64, 30),
        painting(cfg, 100, 128, 30),
        decoding(cfg),
        reading(cfg, 768, 128)[0],
        answering(cfg, 768, 128),
    ]
    stages = ("adaptation", "pretrain", "sft") if size == "1p3b" else ()
    return out + [training(name, None) for name in stages]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--size", default="1p3b", help="test | emoji | small | 1p3b")
    print("| program | wanted, TFLOP | share | besides | counted, TFLOP | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines(p.parse_args().size):
        print(line.text(), flush=True)


if __name__ == "__main__":
    main()
