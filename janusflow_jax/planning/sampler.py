"""Painting and answering, compiled for a machine that is not there: the pipeline's own programs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from janusflow_jax import pipeline
from janusflow_jax.config import TrainConfig
from janusflow_jax.models import janusflow, llama, vae
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import (
    collectives as plan_collectives,
    compile as plan_compile,
    flops as plan_flops,
    report as plan_report,
    topology as plan_topology,
)
from janusflow_jax.planning.compile import Compiled
from janusflow_jax.planning.topology import Machine
from janusflow_jax.training import flops

PROMPT = 64
"""Tokens of a prompt to paint, padded (SPEC section 6 counts with 40)."""
QUESTION = 768
"""Positions of a question about one picture, padded."""
ANSWER = 512
"""Tokens that the buffer of keys and values has room for."""


def compile_all(
    cfg: TrainConfig, machine: Machine, rows: int = pipeline.MAX_BATCH, num_steps: int = 30
) -> list[tuple[str, Compiled, Any, float]]:
    """The programs of a batch of `rows`: (what, compiled, jaxpr, useful operations).

    Raises:
      ConfigError: the config, the topology or the mesh cannot work.
    """
    cfg = plan_compile.prepare(cfg, machine)
    mesh = sharding.make_mesh(cfg.mesh, plan_topology.devices(machine))
    model = janusflow.JanusFlow(cfg.model, jnp.dtype("bfloat16"))
    out = []
    for what, fn, args, kwargs, donated, useful in _programs(cfg, model, mesh, rows, num_steps):
        with jax.set_mesh(mesh):
            traced = fn.trace(*args, **kwargs)
            program, lacks, seconds = plan_compile.build(traced, machine, False)
        inputs = {n: a for n, a in donated.items() if a is not None}
        run = Compiled(cfg, machine, mesh, inputs, program, lacks, seconds)
        out.append((what, run, traced.jaxpr, useful))
    return out


def _programs(cfg: TrainConfig, model: Any, mesh: Any, rows: int, num_steps: int) -> Any:
    """(what, jitted function, arguments, keywords, arguments by part, useful operations)."""
    shapes = janusflow.param_shapes(cfg.model)
    shapes["llm"] = jax.eval_shape(llama.unstack, shapes["llm"])  # as the pipeline holds it
    params = _bfloat16({n: t for n, t in shapes.items() if not n.startswith("repa")})
    params = plan_compile.placed(params, sharding.tree_shardings(params, mesh))
    vae_params = _bfloat16(vae.param_shapes(cfg.model.vae))
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), vae_params)
    vae_params = plan_compile.placed(vae_params, everywhere)

    def put(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        spec = sharding.fit(P(sharding.BATCH, *[None] * (len(shape) - 1)), shape, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    m = cfg.model
    tokens, lengths = put((rows, PROMPT), jnp.int32), put((rows,), jnp.int32)
    noise = put((rows, *m.latent_shape), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    yield (
        f"{rows} pictures, {num_steps} Euler steps with guidance",
        pipeline._sample,
        (model, params, tokens, lengths, noise, number),
        {"num_steps": num_steps, "guided": True},
        {"params": params, "inputs": noise},
        rows * flops.image_flops(m, 40, num_steps)["all"],
    )
    yield (
        f"{rows} pictures' pixels",
        pipeline._decode_vae,
        (m, "bfloat16", vae_params, noise),
        {},
        {"vae": vae_params, "inputs": noise},
        0.0,
    )
    question = put((rows, QUESTION), jnp.int32)
    slots = put((rows, m.slot_len, m.llm.width), jnp.bfloat16)
    one, seeds = put((rows, 1), jnp.int32), put((rows,), jnp.uint32)
    prefill = (model, params, question, slots, one, one, one, lengths, seeds)
    seen = rows * QUESTION
    yield (
        f"{rows} questions of {QUESTION} positions read",
        pipeline._start,
        prefill,
        {"max_new": ANSWER},
        {"params": params, "inputs": (question, slots)},
        2 * flops.llm_kernel(m) * seen + flops.attention_per_pair(m) * seen * (QUESTION + 1) / 2,
    )
    state = jax.eval_shape(lambda *a: pipeline._start(model, *a, max_new=ANSWER), *prefill[1:])
    state = jax.tree_util.tree_map_with_path(lambda path, x: _state(path, x, mesh), state)
    new = rows * pipeline.CHUNK_TOKENS
    yield (
        f"{pipeline.CHUNK_TOKENS} tokens of {rows} answers",
        pipeline._advance,
        (model, params, state, number, number),
        {"num_tokens": pipeline.CHUNK_TOKENS, "eos_id": 1},
        {"params": params, "inputs": state},
        new
        * (
            2 * flops.llm_kernel(m)
            + 2.0 * m.llm.width * m.llm.vocab_size
            + flops.attention_per_pair(m) * (QUESTION + ANSWER / 2)
        ),
    )


def _bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def _state(path: Any, x: Any, mesh: Any) -> jax.ShapeDtypeStruct:
    """Decoding's state: rows over the devices, keys' and values' heads over `tensor`."""
    cached = sharding.path_name(path).split("/")[-1] in ("k", "v")
    spec = P(sharding.BATCH, None, "tensor", None) if cached else P(sharding.BATCH)
    spec = P(*list(spec)[: x.ndim], *[None] * (x.ndim - len(spec)))
    where = NamedSharding(mesh, sharding.fit(spec, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def report(
    run: Compiled, what: str, jaxpr: Any, useful: float, given: plan_report.Assumptions
) -> plan_report.Report:
    """One program's report; its time is bounded by reading the parameters too."""
    passes = float(pipeline.CHUNK_TOKENS)  # of the loop over tokens; painting's is a scan
    done = plan_flops.count(jaxpr, while_trips=passes, platform=run.machine.chip.platform)
    sent = plan_report.traffic(run, passes)
    links = [sum((c.sent for c in sent if c.between == b), 0.0) for b in (False, True)]
    times = plan_report.step_time(run, done, links, given)
    if what.startswith(f"{pipeline.CHUNK_TOKENS} tokens"):
        chip = run.machine.chip
        read = sum(plan_compile.bytes_of(t) for t in run.arguments.values())
        # Every token reads the parameters and the buffer once.
        times["update"] = passes * read * chip.cores / chip.hbm
        times["best"] = max(times["best"], times["update"])
        times["worst"] += times["update"]
        times["estimate"] = max(times["estimate"], times["update"])
    found = plan_report.memory(run)
    return {
        "config": what,
        "topology": run.machine.name,
        "chips": run.machine.chips,
        "mesh": dict(run.mesh.shape),
        "attention": "xla",
        "unit": "program's",
        "compile_seconds": run.seconds,
        "cpu_seconds": time.process_time(),
        "peak_rss": plan_compile.peak_rss(),
        "memory": found,
        "advice": [] if found["fits"] else ["fewer rows at a time", "--config.mesh.fsdp=2"],
        "flops": {"useful": useful, "jaxpr": done, "executed": done},
        "collectives": [t._asdict() for t in plan_collectives.totals(sent)],
        "assumptions": dataclasses.asdict(given),
        "time": times,
    }
