"""The pipeline's own programs, which generate images and text, traced for another machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax import pipeline
from janusflow_jax.config import ModelConfig, SamplerConfig
from janusflow_jax.models import janusflow, llama, vae
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.planning import compile as plan_compile, flops as plan_flops
from janusflow_jax.sampling import flow, programs
from janusflow_jax.training import flops

PROMPT = 40  # tokens of an image's prompt
PADDED_PROMPT = 64
QUESTION = 768  # padded positions of a question about one image
ANSWER = 512  # tokens that the key-value cache has room for


class Program(NamedTuple):
    name: str
    traced: jax.stages.Traced
    arguments: dict[str, Any]  # trees of shapes with shardings, by part
    passes: int  # over the arguments: Euler steps, or tokens
    useful: float  # operations
    overhead: dict[str, float]  # other operations by cause

    def budget(self, platform: str = "tpu") -> plan_flops.Budget:
        counted = plan_flops.count(self.traced.jaxpr, float(self.passes), platform)
        return plan_flops.Budget(self.useful, self.overhead, counted)


def sampler_programs(
    m: ModelConfig, mesh: Mesh, rows: int, cfg: SamplerConfig
) -> Iterator[Program]:
    """Generating `rows` images, decoding their latents, and answering `rows` questions.

    Args: cfg: of the images.
    """
    guided = int(flow.guided_steps(cfg).sum())
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
    question, one = array(rows, QUESTION), array(rows, 1)
    slots = array(rows, m.slot_len, m.llm.width, dtype=jnp.bfloat16)
    prompt = (question, slots, one, one, one, array(rows), array(rows, dtype=jnp.uint32))
    state = jax.eval_shape(
        lambda *args: programs.prefill(model, *args, max_new=ANSWER), params, *prompt
    )
    state = jax.tree_util.tree_map_with_path(lambda path, x: _state(path, x, mesh), state)
    per_token, per_pair = 2 * flops.llm_kernel(m), flops.attention_per_pair(m)
    head = 2.0 * m.llm.width * m.llm.vocab_size
    tokens = pipeline.CHUNK_TOKENS

    with jax.set_mesh(mesh):
        traced = programs.sample.trace(
            model,
            params,
            array(rows, PADDED_PROMPT),
            array(rows),
            noise,
            scalar,
            head=1,
            sampler=cfg,
        )
    branches = cfg.steps + guided
    computed = PADDED_PROMPT**2 + branches * m.slot_len * (m.slot_len + PADDED_PROMPT)
    visible = branches * _causal(m.slot_len) + m.slot_len * (cfg.steps * PROMPT + guided)
    visible += _causal(PROMPT)
    yield Program(
        f"images, batch {rows}, {cfg.steps} steps, {guided} with guidance",
        traced,
        {"model": params, "inputs": noise},
        cfg.steps,
        rows * flops.image_flops(m, PROMPT, guided, cfg.steps - guided),
        {
            "padding": rows * per_token * (PADDED_PROMPT - PROMPT),
            "masked attention": rows * per_pair * (computed - visible),
        },
    )

    with jax.set_mesh(mesh):
        traced = programs.latents_to_pixels.trace(m, "bfloat16", vae_params, noise)
    yield Program(
        f"VAE decode, batch {rows}",
        traced,
        {"vae": vae_params, "inputs": noise},
        1,
        rows * flops.vae_decoder(m),
        {},
    )

    with jax.set_mesh(mesh):
        traced = programs.prefill.trace(model, params, *prompt, max_new=ANSWER)
    visible = _causal(QUESTION)
    yield Program(
        f"prefill, batch {rows}, {QUESTION} positions",
        traced,
        {"model": params, "inputs": (question, slots)},
        1,
        rows * (per_token * QUESTION + per_pair * visible + head),
        {
            "masked attention": rows * per_pair * (QUESTION**2 - visible),
            "unused cache": rows * per_pair * QUESTION * ANSWER,
        },
    )

    with jax.set_mesh(mesh):
        traced = programs.decode.trace(
            model, params, state, scalar, scalar, num_tokens=tokens, eos_id=1
        )
    visible = tokens * QUESTION + _causal(tokens)
    yield Program(
        f"decode, batch {rows}, {tokens} tokens",
        traced,
        {"model": params, "inputs": state},
        tokens,
        rows * (tokens * (per_token + head) + per_pair * visible),
        {"unused cache": rows * per_pair * (tokens * (QUESTION + ANSWER) - visible)},
    )


def _causal(length: int) -> float:
    return length * (length + 1) / 2


def _bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def _state(path: Any, x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Decoding's state: rows over the devices, heads of keys and values over `tensor`."""
    cached = trees.path_name(path).split("/")[-1] in ("k", "v")
    spec = P(sharding.BATCH, None, "tensor", None) if cached else P(sharding.BATCH)
    spec = P(*list(spec)[: x.ndim], *[None] * (x.ndim - len(spec)))
    where = NamedSharding(mesh, sharding.fit(spec, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
