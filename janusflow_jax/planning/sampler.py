"""The pipeline's own programs, which generate images and text, compiled for another machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from janusflow_jax import pipeline
from janusflow_jax.config import TrainConfig
from janusflow_jax.models import janusflow, llama, vae
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.planning import (
    compile as plan_compile,
    flops as plan_flops,
    report as plan_report,
    topology,
)
from janusflow_jax.planning.compile import Compiled
from janusflow_jax.planning.topology import Machine
from janusflow_jax.sampling import programs
from janusflow_jax.training import flops

PROMPT = 64  # padded tokens of an image's prompt
PROMPT_USED = 40  # of them not padding
QUESTION = 768  # padded positions of a question about one image
ANSWER = 512  # tokens that the key-value cache has room for


class Program(NamedTuple):
    name: str
    function: Any  # jitted
    args: tuple[Any, ...]
    options: dict[str, Any]
    inputs: dict[str, Any]  # its arguments by part, for the memory table
    useful: float  # operations
    tokens: int = 0  # that it decodes one after another


def reports(
    cfg: TrainConfig,
    machine: Machine,
    rows: int,
    num_steps: int,
    assume: plan_report.Assumptions,
) -> list[plan_report.Report]:
    """Compiles the programs for a batch of `rows` and reports on each.

    Raises:
      ConfigError: the config, the topology or the mesh cannot work.
    """
    cfg = plan_compile.prepare(dataclasses.replace(cfg, attention="xla"), machine)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices(machine))
    out = []
    for program in sampler_programs(cfg, mesh, rows, num_steps):
        with jax.set_mesh(mesh):
            traced = program.function.trace(*program.args, **program.options)
            built = plan_compile.build(traced, machine, exact=False)
        run = Compiled(cfg, machine, mesh, program.inputs, *built)
        out.append(_report(run, program, traced.jaxpr, assume))
    return out


def sampler_programs(cfg: TrainConfig, mesh: Any, rows: int, num_steps: int) -> Iterator[Program]:
    """The pipeline's programs with the shapes and shardings of their arguments."""
    m = cfg.model
    model = janusflow.JanusFlow(m, jnp.dtype("bfloat16"))
    shapes = janusflow.param_shapes(m)
    shapes["llm"] = jax.eval_shape(llama.unstack, shapes["llm"])  # as the pipeline holds it
    params = _bfloat16({n: t for n, t in shapes.items() if not n.startswith("repa")})
    params = plan_compile.with_shardings(params, sharding.tree_shardings(params, mesh))
    vae_params = _bfloat16(vae.param_shapes(m.vae))
    replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), vae_params)
    vae_params = plan_compile.with_shardings(vae_params, replicated)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """Rows over the devices."""
        spec = sharding.fit(P(sharding.BATCH, *[None] * (len(shape) - 1)), shape, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    noise = array(rows, *m.latent_shape, dtype=jnp.float32)
    yield Program(
        f"{rows} images, {num_steps} Euler steps with guidance",
        programs.sample,
        (model, params, array(rows, PROMPT), array(rows), noise, scalar),
        {"num_steps": num_steps, "guided": True},
        {"params": params, "inputs": noise},
        rows * flops.image_flops(m, PROMPT_USED, num_steps),
    )
    yield Program(
        f"pixels of {rows} images",
        programs.latents_to_pixels,
        (m, "bfloat16", vae_params, noise),
        {},
        {"vae": vae_params, "inputs": noise},
        0.0,
    )
    question, one = array(rows, QUESTION), array(rows, 1)
    slots = array(rows, m.slot_len, m.llm.width, dtype=jnp.bfloat16)
    prompt = (question, slots, one, one, one, array(rows), array(rows, dtype=jnp.uint32))
    per_token, per_pair = 2 * flops.llm_kernel(m), flops.attention_per_pair(m)
    yield Program(
        f"prefill of {rows} questions, {QUESTION} positions each",
        programs.prefill,
        (model, params, *prompt),
        {"max_new": ANSWER},
        {"params": params, "inputs": (question, slots)},
        rows * QUESTION * (per_token + per_pair * (QUESTION + 1) / 2),
    )
    state = jax.eval_shape(
        lambda *args: programs.prefill(model, *args, max_new=ANSWER), params, *prompt
    )
    state = jax.tree_util.tree_map_with_path(lambda path, x: _state(path, x, mesh), state)
    head = 2.0 * m.llm.width * m.llm.vocab_size
    tokens = pipeline.CHUNK_TOKENS
    yield Program(
        f"{tokens} tokens of {rows} answers",
        programs.decode,
        (model, params, state, scalar, scalar),
        {"num_tokens": tokens, "eos_id": 1},
        {"params": params, "inputs": state},
        rows * tokens * (per_token + head + per_pair * (QUESTION + ANSWER / 2)),
        tokens,
    )


def _bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def _state(path: Any, x: Any, mesh: Any) -> jax.ShapeDtypeStruct:
    """Decoding's state: rows over the devices, heads of keys and values over `tensor`."""
    cached = trees.path_name(path).split("/")[-1] in ("k", "v")
    spec = P(sharding.BATCH, None, "tensor", None) if cached else P(sharding.BATCH)
    spec = P(*list(spec)[: x.ndim], *[None] * (x.ndim - len(spec)))
    where = NamedSharding(mesh, sharding.fit(spec, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _report(
    run: Compiled, program: Program, jaxpr: Any, assume: plan_report.Assumptions
) -> plan_report.Report:
    trips = float(program.tokens or 1)  # the loop over Euler steps is a scan of known length
    executed = plan_flops.count(jaxpr, while_trips=trips, platform=run.machine.chip.platform)
    sent = plan_report.traffic(run, trips)
    times = plan_report.step_time(run, executed, sent, assume)
    if program.tokens:  # each token reads the parameters and the cache once
        chip = run.machine.chip
        read = sum(plan_compile.bytes_per_device(t) for t in run.arguments.values())
        times["update"] = program.tokens * read * chip.cores / chip.hbm
        times["best"] = max(times["best"], times["update"])
        times["worst"] += times["update"]
        times["estimate"] = max(times["estimate"], times["update"])
    return {
        **plan_report.common(run, program.name, sent, times, assume),
        "unit": "program's",
        "flops": {"useful": program.useful, "jaxpr": executed, "executed": executed},
    }
