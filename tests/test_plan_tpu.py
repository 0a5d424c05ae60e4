"""The real widths, compiled for TPUs without having one. Needs libtpu: `jax[tpu]`."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.gathers import activation_gathers, elements, stack_gathers

from janusflow_jax import config as c
from janusflow_jax.parallel import chips, compiler, sharding
from janusflow_jax.planning import (
    compile as plan_compile,
    report as plan_report,
    topology as plan_topology,
)

ROOT = Path(__file__).parents[1]
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install 'jax[tpu]'"
    ),
]


def thin() -> c.TrainConfig:
    """Pre-training with the real widths of the LLM and small other parts; compiles in a minute."""
    cfg = runpy.run_path(str(ROOT / "configs" / "pretrain.py"))["get_config"]()
    cfg.model.llm.num_layers, cfg.model.repa.layer, cfg.model.und.num_layers = 3, 2, 2
    cfg.model.und.width, cfg.model.und.num_heads, cfg.model.und.mlp_width = 256, 4, 1024
    cfg.model.gen.num_blocks, cfg.model.gen.width = 1, 128
    cfg.model.vae.channels = (32, 64, 64, 64)
    cfg.model.vae.layers_per_block = 1
    cfg.data.row_len, cfg.data.gen_slots, cfg.data.und_slots = 2048, 2, 2
    cfg.mesh, cfg.batch_rows = c.MeshConfig(fsdp=8, tensor=2), 32
    return cfg


@pytest.fixture(scope="module", autouse=True)
def precision():
    """As in a run: Mosaic has no bfloat16 matmuls at the tests' precision (highest)."""
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture(scope="module")
def run(precision):
    """Two slices: `data` is between them, `fsdp` and `tensor` are within."""
    return plan_compile.train(thin(), plan_topology.parse("v5e:4x4", slices=2))


@pytest.fixture(scope="module")
def items(run):
    return plan_report.traffic(run, 1.0)


def test_neither_activations_nor_stacked_parameters_are_gathered(run, items):
    gathers = [x for x in items if x.kind == "all-gather"]
    cfg = run.cfg
    parts = ("params", "frozen", "vae")
    shapes = [x.shape for n in parts for x in jax.tree.leaves(run.arguments[n])]
    rows = cfg.batch_rows // (run.mesh.shape["data"] * run.mesh.shape["fsdp"])
    own_activations = rows * cfg.data.row_len * cfg.model.llm.width
    # Kernels of the LLM's layers are gathered layer by layer: forward, again, backward.
    per_layer = math.prod((cfg.model.llm.width, cfg.model.llm.mlp_width)) // 2  # of two: tensor
    assert sum(x.times for x in gathers if per_layer in (elements(x), elements(x) // 2)) >= 3 * 3
    assert not activation_gathers(items, shapes, own_activations)
    # Stacks of kernels have three dimensions; a convolution's kernel has four and is no stack.
    assert not stack_gathers(items, [shape for shape in shapes if len(shape) == 3])
    head = cfg.model.llm.width * cfg.model.llm.vocab_size
    assert max(elements(x) for x in gathers) < head // 8  # neither the head nor the embedding moves
    assert plan_report.memory(run).fits


def test_only_gradients_cross_slices(run, items):
    assert dict(run.mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 2}
    across = sum(x.sent for x in items if x.between)
    within = sum(x.sent for x in items if not x.between)
    assert 0 < across < within
    assert {x.kind for x in items if x.between} == {"send"}
    # At most float32 gradients, sharded over fsdp and tensor; no activations.
    trained = plan_compile.bytes_per_device(run.arguments["params"])
    assert across < 1.1 * trained


def test_the_figure_in_the_compilers_message_is_the_peak_memory():
    """8 GiB of arguments and as much of temporaries: the message contains their sum."""

    def step(x, y):
        a = y @ y.T
        b = jnp.sin(a) @ jnp.cos(a)
        return 2 * x, (b @ y).sum() + (a @ (b @ y)).max()

    shape, runs = jax.ShapeDtypeStruct, []
    for name in ("v5e:1x1", "v5p:1x1x1"):
        machine = plan_topology.parse(name)
        mesh = sharding.make_mesh(c.MeshConfig(), plan_topology.devices(machine))
        where = jax.NamedSharding(mesh, jax.P())
        args = [
            shape(s, jnp.float32, sharding=where) for s in ((2 * 2**30,), (40 * 1024 - 512, 128))
        ]
        traced = jax.jit(step, donate_argnums=0).trace(*args)
        runs.append(plan_compile.build(traced, machine))
    (none, lacks, _), (program, _, _) = runs
    assert none is None and "15.75G" in lacks
    assert plan_compile.required_bytes(lacks) == pytest.approx(
        program.memory_analysis().peak_memory_in_bytes, rel=0.01
    )


def test_adapters_of_the_released_size_train_on_one_small_chip():
    """The last row of the memory table in docs/finetuning.md."""
    cfg = runpy.run_path(str(ROOT / "configs" / "finetune.py"))["get_config"]("generate,lora,light")
    cfg.mesh = c.MeshConfig(fsdp=1)
    run = plan_compile.train(cfg, plan_topology.parse("v5e:1x1"))
    assert plan_report.memory(run).peak < 4.6 * chips.GIB


def test_fsdp_of_16_is_one_axis_of_the_torus():
    devices = plan_topology.devices(plan_topology.parse("v5e:16x16"))
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=16), devices)
    for ring in mesh.devices[:, :, 0]:
        coordinates = [sorted({device.coords[axis] for device in ring}) for axis in range(2)]
        assert sorted(map(len, coordinates)) == [1, 16]


@pytest.mark.parametrize(
    ("topology", "kinds"), [("v5e:4x4", ["all-reduce"]), ("v6e:4x4", ["all-reduce", "all-gather"])]
)
def test_collectives_of_a_layer_run_beside_others(topology, kinds):
    machine = plan_topology.parse(topology)
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=4), plan_topology.devices(machine))
    rows = jax.P(("data", "fsdp"))

    def loss(kernels, x):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(x, kernels):
            hidden = jax.lax.with_sharding_constraint(jax.nn.silu(x @ kernels["up"]), rows)
            return jax.lax.with_sharding_constraint(x + hidden @ kernels["down"], rows)

        x, _ = jax.lax.scan(lambda x, kernels: (block(x, kernels), None), x, kernels)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def shape(size: tuple[int, ...], spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    kernels = {
        "up": shape((3, 2048, 5632), jax.P(None, "fsdp")),
        "down": shape((3, 5632, 2048), jax.P(None, None, "fsdp")),
    }
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).lower(kernels, shape((32, 4096, 2048), rows))
        options = compiler.options(mesh)
    assert options == compiler.OPTIONS["tpu"]

    def asynchronous(options: dict) -> dict[str, int]:
        text = lowered.compile(compiler_options=plan_compile.QUICK["tpu"] | options).as_text()
        bodies = [x for x in text.split("\n}\n") if "AsyncCollectiveStart" in x]
        return {kind: sum(f" {kind}(" in x for x in bodies) for kind in kinds}

    plain, ours = asynchronous({}), asynchronous(options)
    assert all(ours[kind] > plain[kind] == 0 for kind in kinds)


def test_v4_and_single_chips():
    machine = plan_topology.parse("v4:2x2x1")
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=4), plan_topology.devices(machine))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert len(plan_topology.devices(plan_topology.parse("v5e:1x1"))) == 1
    with pytest.raises(c.ConfigError, match=r"v5e:3x3: .*not divisible.*(\n.*)*expected v5e:AxB"):
        plan_topology.devices(plan_topology.parse("v5e:3x3"))


def test_rows_too_long_for_a_core():
    cfg = thin()
    cfg.data.row_len = 8192
    with pytest.raises(c.ConfigError, match="at most 4096 positions .*16 MiB.*got 8192"):
        plan_compile.train(cfg, plan_topology.parse("v4:2x2x4"))
