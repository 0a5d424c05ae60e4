"""Plans without a device: topologies, operations, collectives, reports."""

from __future__ import annotations

import dataclasses
import functools
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.gathers import activation_gathers, stack_gathers
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec as P

from janusflow_jax import config as c
from janusflow_jax.models import janusflow, llama, splash
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import (
    collectives as plan_collectives,
    compile as plan_compile,
    flops as plan_flops,
    hlo,
    report as plan_report,
    roofline,
    sampler,
    topology as plan_topology,
)

ROOT = Path(__file__).parents[1]


def load(name: str, arg: str | None = None) -> c.TrainConfig:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arg)


# --- names


def test_topology_names():
    machine = plan_topology.parse("v5e:16x16", slices=2)
    assert (machine.chips, machine.name) == (512, "2 x v5e:16x16")
    assert plan_topology.parse("h100:8").shape == (1, 8)
    assert plan_topology.parse("h100:8x8").chips == 64
    for bad in ("v5e-256", "v5e:16", "v5p:4x4", "h200:8", "v5e:0x4", "v5e:"):
        with pytest.raises(c.ConfigError, match=f"got '{bad}'; expected .*v5e:AxB"):
            plan_topology.parse(bad)
    with pytest.raises(c.ConfigError, match="slices"):
        plan_topology.parse("v5e:4x4", slices=0)


@pytest.mark.parametrize(
    ("name", "package"),
    [("v5e:4x4", r"pip install 'jax\[tpu\]=="), ("h100:8", "pip install jax-cuda13-plugin==")],
)
def test_a_missing_compiler_names_its_package(monkeypatch, name, package):
    monkeypatch.setattr(plan_topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(c.ConfigError, match=package):
        plan_topology.devices(plan_topology.parse(name))


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "h100:1"])
@pytest.mark.parametrize(
    "name", ["emoji", "emoji:test", "finetune:generate,emoji", "sft:test", "sft", "ablation:A"]
)
def test_auto_attention_can_run_on_every_platform(name, topology):
    file, _, arg = name.partition(":")
    cfg = load(file, arg or None)
    prepared = plan_compile.prepare(cfg, plan_topology.parse(topology))
    kernel = "splash" if topology.startswith("v") else "flash"
    fits = cfg.data.row_len % splash.UNIT == 0
    assert prepared.attention == (kernel if fits else "xla")


def test_errors_of_the_command_have_no_traceback():
    command = [sys.executable, "tools/plan.py", "--config=configs/pretrain.py"]
    for flag, word in (("--topology=v9:4x4", "v9:4x4"), ("--config.mesh.fdsp=2", "'fsdp'")):
        done = subprocess.run(
            [*command, "--topology=v5e:4x4", flag], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr


# --- operations


def counted(fn, *args, **kwargs) -> float:
    return plan_flops.count(jax.jit(fn).trace(*args).jaxpr, **kwargs)


def test_operations_of_a_jaxpr():
    x = jnp.ones((4, 8))
    w = jnp.ones((8, 8))
    once = 2.0 * 4 * 8 * 8
    assert counted(lambda x, w: x @ w, x, w) == once
    loop = lambda x, w: jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=5)[0]  # noqa: E731
    assert counted(loop, x, w) == 5 * once
    assert (
        counted(
            lambda x, w: jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, h: h @ w, x),
            x,
            w,
            while_trips=3.0,
        )
        == 3 * once
    )
    block = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))
    grad = jax.value_and_grad(lambda x, w: jnp.sum(block(x, w)), (0, 1))
    assert counted(grad, x, w) == (2 + 2 + 4) * once  # forward, remat, 2 x backward
    assert counted(lambda x, w: (x @ w, x)[1], x, w) == 0  # an unused result


def test_operations_of_branches_and_shards():
    x, w = jnp.ones((8, 8)), jnp.ones((8, 8))
    once = 2.0 * 8**3
    either = lambda x, w: jax.lax.platform_dependent(  # noqa: E731
        x, w, cpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w
    )
    assert counted(either, x, w, platform="tpu") == once
    assert counted(either, x, w, platform="cpu") == 2 * once
    mesh = sharding.make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        split = jax.shard_map(lambda x, w: x @ w, in_specs=(P("data"), P()), out_specs=P("data"))
        assert counted(split, x, w) == once


def test_operations_of_convolutions():
    image = jnp.ones((2, 16, 16, 6))
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    kernel = jnp.ones((3, 3, 6, 10))
    once = 2.0 * 2 * 16 * 16 * 9 * 6 * 10
    assert counted(conv, image, kernel) == once
    both = jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k))), (0, 1))
    assert counted(both, image, kernel) == pytest.approx(3 * once)
    depthwise = functools.partial(conv, feature_group_count=6)
    thin = jnp.ones((3, 3, 1, 6))
    both = jax.grad(lambda x, k: jnp.sum(jnp.sin(depthwise(x, k))), (0, 1))
    assert counted(both, image, thin) == pytest.approx(3 * 2.0 * 2 * 16 * 16 * 9 * 6)


REMAT, OPTIMIZER = "recomputation (remat)", "optimizer, EMA, guard"


def budget_of(cfg: c.TrainConfig) -> plan_flops.Budget:
    return plan_flops.budget(cfg, sharding.make_mesh(cfg.mesh))


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("pretrain", "test"),
        pytest.param("adaptation", None, marks=pytest.mark.slow),
        pytest.param("pretrain", None, marks=pytest.mark.slow),
        pytest.param("pretrain", "7b,512", marks=pytest.mark.slow),
        pytest.param("sft", None, marks=pytest.mark.slow),
    ],
)
def test_both_counts_of_the_step_agree(name, arg):
    """The full size too: nothing is computed, so it takes seconds."""
    cfg = load(name, arg)
    budget = budget_of(cfg)
    assert abs(budget.difference) < 0.005  # 3 % is the requirement
    assert budget.useful < 0.8 * budget.total
    wrong = budget._replace(overhead=budget.overhead | {REMAT: 0.0})
    assert abs(wrong.difference) > 0.03


@pytest.mark.parametrize("remat", ["names", pytest.param("none", marks=pytest.mark.slow)])
def test_both_counts_agree_with_less_recomputation(remat):
    cfg = load("pretrain", "test")
    again = plan_flops.recomputed(cfg, {"llm"})
    budget = budget_of(dataclasses.replace(cfg, remat=remat))
    assert abs(budget.difference) < 0.005
    assert budget.overhead[REMAT] < 0.3 * again


def test_both_counts_of_the_sampler_agree():
    """With half of the steps guided; counting one branch more or less is 8 % here."""
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    cfg = c.SamplerConfig(steps=6, guide_until=0.5)
    images = next(sampler.sampler_programs(c.model_config("small"), mesh, 1, cfg))
    assert abs(images.budget().difference) < 0.02


@pytest.mark.parametrize("remat", ["full", pytest.param("names", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fields",
    [{"qk_norm": "head", "attn_bias": "qkv"}, {"qk_norm": "all", "norms": "post"}],
    ids=["norms of queries and keys", "norms of outputs"],
)
def test_both_counts_agree_for_relatives_of_llama(fields, remat):
    cfg = dataclasses.replace(load("pretrain", "test"), remat=remat)
    cfg.model.llm = dataclasses.replace(cfg.model.llm, num_kv_heads=2, **fields)
    assert abs(budget_of(cfg).difference) < 0.005


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_names_keep_what_the_attention_kernel_needs(kernel):
    cfg = c.model_config("test")
    cfg.llm.head_dim = 128
    params = janusflow.param_shapes(cfg)["llm"]
    x = jax.ShapeDtypeStruct((8, 256, cfg.llm.width), jnp.bfloat16)
    ids = jnp.ones((8, 256), jnp.int32)

    def kernels(remat: str) -> list[str]:
        model = llama.Llama(cfg.llm, jnp.bfloat16, remat, kernel)
        loss = lambda p, x: jnp.sum(model.apply({"params": p}, x, ids, ids)[0])  # noqa: E731
        with jax.set_mesh(sharding.make_mesh(c.MeshConfig())):
            jaxpr = jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr
        alive, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), True)
        return re.findall(rf"name={kernel}_(\w+)", str(alive))

    full, names, none = (kernels(remat) for remat in ("full", "names", "none"))
    assert len(full) - 1 == len(names) == len(none)
    assert {f"{kernel}_{x}" for x in none} == {x for x in plan_flops.MATMULS if kernel in x}


@pytest.mark.parametrize(
    ("text", "measured"), [(0.06, 0.962), (0.2, 1.0), (0.09, 0.97), (0.0, 0.929)]
)
def test_typical_rows_are_as_full_as_packing_makes_them(text, measured):
    assert 1 / sum(plan_flops.rows_of(text)) == pytest.approx(measured, abs=0.01)


def test_operations_of_attention_kernels():
    shapes = hlo.shapes("s32[2,8]{1,0}, bf16[2,16,4096,128]{3,2,1,0}, s32[2,4096,128]{2,1,0}")
    count = lambda name: plan_flops.attention_kernel(name, shapes, 4096, 0.25)  # noqa: E731
    matmul = 2 * 2 * 16 * 4096**2 * 128 / 4  # two rows
    assert count("jit(step)/splash_forward/pallas_call") == 2 * matmul
    assert count("jit(step)/splash_backward") == 5 * matmul
    assert count("jit(step)/flash_keys/pallas_call") == 4 * matmul


def test_the_chip_with_the_most_rows_of_text_attends_longest():
    """A row of images has pairs in 16 of the 36 blocks up to the diagonal, a text in all."""
    cfg = load("pretrain")
    share = plan_flops.attention_share
    assert 16 / 64 < share(cfg, 2, 1) < share(cfg, 2, 256) < share(cfg, 1, 10_000)
    assert share(cfg, 2, 256) == pytest.approx((36 + 16) / 2 / 64)  # never two texts on a chip
    assert share(cfg, 1, 10_000) == pytest.approx(36 / 64)
    weights = {"generate": 1.0, "text": 0.0}
    cfg.data.sources = tuple(
        dataclasses.replace(s, weight_after=weights.get(s.task, 0.0)) for s in cfg.data.sources
    )
    assert share(cfg, 2, 256) == 16 / 64


# --- collectives

TPU_LOOP = """HloModule jit_step, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%start (p: bf16[2,128]) -> (bf16[2,128], bf16[8,128]) {
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[2,128], bf16[8,128]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[2,128]) -> bf16[8,128] {
  %all-gather.2 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %custom-call.2 = bf16[8,128] custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%async_collective_fusion.3 (p: bf16[2,128]) -> bf16[8,128] {
  ROOT %all-gather.3 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%body (c: (s32[], bf16[2,128])) -> (s32[], bf16[2,128]) {
  %c = (s32[]{:T(128)}, bf16[2,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = bf16[2,128]{1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %f1 = (bf16[2,128], bf16[8,128]) fusion(%x), kind=kCustom, calls=%start
  %overlapped = bf16[8,128]{1,0} fusion(%f1), kind=kCustom, calls=%async_collective_fusion.3
  %f2 = bf16[8,128]{1,0} fusion(%f1), kind=kCustom, calls=%done
  %permute = (bf16[2,128], bf16[2,128], u32[], u32[]) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,4},{4,0}}
  %sum.1 = bf16[2,128]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  %sum.2 = bf16[2,128]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %out = (s32[]{:T(128)}, bf16[2,128]{1,0}) tuple(%next, %x)
}

%test (c: (s32[], bf16[2,128])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[2,128]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(19)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (x: bf16[2,128]) -> f32[4] {
  %x.1 = bf16[2,128]{1,0} parameter(0)
  %first = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[2,128]{1,0}) tuple(%first, %x.1)
  %while.1 = (s32[]{:T(128)}, bf16[2,128]{1,0}) while(%init), condition=%test, body=%body
  %y = f32[4]{0} constant({1,2,3,4})
  ROOT %all-reduce.1 = f32[4]{0} all-reduce(%y), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
}
"""  # noqa: E501


def test_loops_and_asynchronous_collectives_of_a_tpu_program():
    by_kind = {x.kind: x for x in plan_collectives.collectives(TPU_LOOP, slices=2)}
    # An asynchronous gather counts once; two sums of one channel (shard_map) count twice.
    assert len(plan_collectives.collectives(TPU_LOOP)) == 5
    gather, permute, reduce = (
        by_kind[k] for k in ("all-gather", "collective-permute", "all-reduce")
    )
    assert (gather.times, gather.group, gather.bytes) == (10, 4, 8 * 128 * 2)
    assert gather.sent == 10 * 8 * 128 * 2 * 3 / 4 and not gather.between
    assert (permute.times, permute.bytes) == (10, 2 * 128 * 2) and permute.between
    assert reduce.times == 1 and reduce.sent == 2 * 16 * 7 / 8 and reduce.between
    inside = plan_collectives.collectives(TPU_LOOP, slices=2, devices=16)  # one slice's program
    assert not any(x.between for x in inside)
    assert [x.exposed for x in (gather, permute, reduce)] == [False, False, True]
    assert permute.members == (0, 4)
    small = [x for x in plan_collectives.collectives(TPU_LOOP) if x.group == 2]
    assert [x.times for x in small if x.kind == "all-reduce"] == [10, 10]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=GT"),  # counts down
        ("constant(2)", "constant(0)"),
        ("tuple(%next, %x)", "custom-call(%next, %x)"),
    ],
)
def test_a_loop_of_another_form_takes_the_assumed_trips(old, new):
    items = plan_collectives.collectives(TPU_LOOP.replace(old, new), while_trips=7.0)
    assert {x.times for x in items if x.kind == "all-gather"} == {7.0}


def test_groups_in_all_spellings():
    groups = lambda text: plan_collectives.replica_groups(text, 4).tolist()  # noqa: E731
    assert groups("replica_groups={{0,2},{1,3}}, x") == [[0, 2], [1, 3]]
    assert groups("replica_groups=[2,2]<=[2,2]T(1,0), x") == [[0, 2], [1, 3]]
    assert groups("replica_groups=[2,2]<=[4], x") == [[0, 1], [2, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, x") == [[0, 2], [1, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}") == [
        [0, 1],
        [2, 3],
    ]
    assert groups("replica_groups=mesh['a'=4] {'a':(2)2}, x") == [[0, 1], [2, 3]]
    assert groups("replica_groups=mesh['a'=4] {'a':(1)2}, x") == [[0, 2], [1, 3]]
    assert groups("to_apply=%x") == [[0, 1, 2, 3]]


LAYERS, ROWS, WIDTH = 5, 16, 32


def compiled_stack(keep_rows: bool, at_once: bool) -> list[plan_collectives.Collective]:
    """A stack of layers on 8 devices, its kernels split; rows that stay where they are, or not."""
    mesh = sharding.make_mesh(c.MeshConfig(data=1, fsdp=8))

    def run(w, x):
        rows = P("fsdp") if keep_rows else P()
        if at_once:
            w = jax.lax.with_sharding_constraint(w, P())

        def body(x, w):
            h = jnp.sin(x @ w)
            return jax.lax.with_sharding_constraint(h, rows), None

        return jax.lax.scan(body, x, w)[0]

    shape = jax.ShapeDtypeStruct
    w = shape(
        (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None))
    )
    x = shape((ROWS, 3, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(w, x).compile().as_text()
    return plan_collectives.collectives(text)


def test_gathers_of_stacked_layers():
    shapes = [(LAYERS, WIDTH, WIDTH)]
    items = compiled_stack(keep_rows=True, at_once=False)
    gathers = [x for x in items if x.kind == "all-gather"]
    assert sum(x.times for x in gathers) == LAYERS
    assert sum(x.times * x.bytes for x in gathers) == LAYERS * WIDTH * WIDTH * 4
    own = ROWS // 8 * 3 * WIDTH
    assert not activation_gathers(items, shapes, own)
    assert not stack_gathers(items, shapes)
    whole = compiled_stack(keep_rows=True, at_once=True)
    assert stack_gathers(whole, shapes)
    moved = compiled_stack(keep_rows=False, at_once=False)
    assert activation_gathers(moved, shapes, own)


# --- time

TPU_STACK = """HloModule jit_step, num_partitions=8

%dilated (x: bf16[4,64,32], y: bf16[4,64,32]) -> f32[4,64,64] {
  %x = bf16[4,64,32]{2,1,0} parameter(0)
  %y = bf16[4,64,32]{2,1,0} parameter(1)
  ROOT %conv = f32[4,64,64]{2,1,0} convolution(%x, %y), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf, metadata={op_name="jit(step)/attn/dot"}
}

%update (stack: f32[10,64,64], new: f32[4,64,64], at: s32[]) -> f32[10,64,64] {
  %stack.1 = f32[10,64,64]{2,1,0} parameter(0)
  %new = f32[4,64,64]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,64,64]{2,1,0} slice(%new), slice={[0:1], [0:64], [0:64]}
  ROOT %dus = f32[10,64,64]{2,1,0} dynamic-update-slice(%stack.1, %part, %at, %zero, %zero)
}

%body (c: (s32[], f32[10,64,64], bf16[4,64,32])) -> (s32[], f32[10,64,64], bf16[4,64,32]) {
  %c = (s32[], f32[10,64,64]{2,1,0}, bf16[4,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %stack = f32[10,64,64]{2,1,0} get-tuple-element(%c), index=1
  %h = bf16[4,64,32]{2,1,0} get-tuple-element(%c), index=2
  %start = (bf16[4,64,32]{2,1,0:S(1)}, bf16[4,64,32]{2,1,0}, u32[]) copy-start(%h)
  %done = bf16[4,64,32]{2,1,0:S(1)} copy-done(%start)
  %local = bf16[4,64,32]{2,1,0:S(1)} negate(%done), backend_config={"estimated_cycles":"3000"}
  %scores = f32[4,64,64]{2,1,0:S(1)} fusion(%done, %local), kind=kOutput, calls=%dilated
  %kernel = bf16[4,64,32]{2,1,0} custom-call(%local), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/llm/splash_forward"}
  %stacked = f32[10,64,64]{2,1,0} fusion(%stack, %scores, %i), kind=kLoop, calls=%update
  ROOT %out = (s32[], f32[10,64,64]{2,1,0}, bf16[4,64,32]{2,1,0}) tuple(%next, %stacked, %kernel)
}

%test (c: (s32[], f32[10,64,64], bf16[4,64,32])) -> pred[] {
  %c.1 = (s32[], f32[10,64,64]{2,1,0}, bf16[4,64,32]{2,1,0}) parameter(0)
  %bound = s32[] constant(10)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x: bf16[4,64,32], s: f32[10,64,64]) -> f32[10,64,64] {
  %x.1 = bf16[4,64,32]{2,1,0} parameter(0)
  %s.1 = f32[10,64,64]{2,1,0} parameter(1)
  %first = s32[] constant(0)
  %init = (s32[], f32[10,64,64]{2,1,0}, bf16[4,64,32]{2,1,0}) tuple(%first, %s.1, %x.1)
  %while.1 = (s32[], f32[10,64,64]{2,1,0}, bf16[4,64,32]{2,1,0}) while(%init), condition=%test, body=%body
  ROOT %result = f32[10,64,64]{2,1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_costs_of_a_tpu_program():
    """A batched matmul that XLA writes as a dilated convolution, arrays in the core's memory, a
    slice written in place, a kernel; ten times each."""
    add, negate, matmul, kernel, update = roofline.costs(hlo.parse(TPU_STACK))
    batch = 4 * 64 * 32 * 2
    assert {x.times for x in (add, negate, matmul, kernel, update)} == {10}
    assert (negate.kind, negate.cycles, negate.bytes) == ("other", 30_000, 10 * batch)
    assert (matmul.kind, matmul.flops) == ("matmul", 10 * 2 * 4 * 64 * 64 * 32)
    assert matmul.bytes == 10 * batch and matmul.cycles is None  # the result stays in the core
    assert (kernel.kind, kernel.op_name) == ("kernel", "jit(step)/llm/splash_forward")
    assert update.bytes == 10 * 64 * 64 * 4 + 10 * 4  # what is written, and the index


def test_operations_of_a_compiled_program_are_those_of_its_jaxpr():
    def loss(w, k, x):
        y = jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, w)[0]
        y = jax.lax.conv_general_dilated(
            y.reshape(2, 4, 4, 8), k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y * y)

    args = jnp.ones((5, 8, 8)), jnp.ones((3, 3, 8, 16)), jnp.ones((32, 8))
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*args)
    text = traced.lower().compile().as_text()
    total = sum(c.flops for c in roofline.costs(hlo.parse(text)))
    assert 0.8 < total / plan_flops.count(traced.jaxpr) <= 1  # XLA does not count padding


# --- reports


@pytest.fixture(scope="module")
def planned():
    """The test twin of pre-training, compiled for the 8 fake devices as if they were chips."""
    cfg = load("pretrain", "test")
    cfg.mesh = c.MeshConfig(data=2, fsdp=4)
    mesh = sharding.make_mesh(cfg.mesh)
    state, batch = plan_compile.state_shapes(cfg), plan_compile.batch_shapes(cfg)
    state = plan_compile.with_shardings(state, sharding.tree_shardings(state, mesh))
    batch = plan_compile.with_shardings(batch, sharding.batch_shardings(batch, mesh))
    cfg.attention = "xla"
    machine = plan_topology.Machine("v5e", (2, 4))
    return plan_compile.Compiled(
        cfg, machine, mesh, {**state, "batch": batch}, None, "Used 33.2G of 15.75G hbm", 1.0
    )


def test_a_plan_that_does_not_fit_gives_advice(planned):
    memory = plan_report.memory(planned)
    assert not memory.fits and memory.parts["opt_state"] >= 2 * memory.parts["params"]
    assert memory.parts["batch"] == plan_compile.bytes_per_device(planned.arguments["batch"])
    assert memory.peak == int(33.2 * 2**30)
    text = plan_report.train_report(planned, plan_report.Assumptions())
    assert "Used 33.2G" in text and "  33.200\n" in text
    tips = plan_report.advice(planned, memory)
    assert all(tip in text for tip in tips)
    assert "--config.remat" not in text  # it is on
    flags = [tip.split()[0] for tip in tips if tip.startswith("--")]
    assert "--config.loss.ce_chunk=128" in flags and "--config.mesh.tensor=2" in flags
    for flag in flags:
        c.check_field(flag.removeprefix("--config.").split("=")[0])
    more_rows = planned._replace(cfg=dataclasses.replace(planned.cfg, batch_rows=16))
    assert "--config.optim.accum_steps=2" in " ".join(plan_report.advice(more_rows, memory))


def test_the_cheapest_remat_leaves_some_memory_free(planned, monkeypatch):
    peaks = {"none": 40.0, "names": 15.5, "full": 5.0}  # of 15.75 GiB

    def train(cfg, machine, exact):
        sizes = dict.fromkeys(("argument_size", "output_size", "alias_size"), 0)
        sizes["peak_memory"] = int(peaks[cfg.remat] * 2**30)
        analysis = types.SimpleNamespace(**{f"{n}_in_bytes": size for n, size in sizes.items()})
        program = types.SimpleNamespace(memory_analysis=lambda: analysis)
        return planned._replace(cfg=cfg, program=program)

    monkeypatch.setattr(plan_compile, "train", train)
    for names, expected in ((15.5, "full"), (12.3, "names")):
        peaks["names"] = names
        assert plan_report.cheapest_remat(planned.cfg, planned.machine).cfg.remat == expected


@pytest.mark.parametrize(
    ("message", "required"),
    [
        ("total memory required for HLO temporaries (28.5G) exceeds available", 28.5 * 2**30),
        ("Used 512.25M of 15.75G hbm. Exceeded hbm capacity", 512.25 * 2**20),
        ("RESOURCE_EXHAUSTED: out of memory", None),
    ],
)
def test_the_compilers_message_has_the_memory_that_is_required(message, required):
    assert plan_compile.required_bytes(message) == required


def test_a_part_takes_its_operations_its_bytes_or_the_compilers_cycles(planned):
    program = types.SimpleNamespace(as_text=lambda: TPU_STACK)
    assume = plan_report.Assumptions(kernel=0.01, memory=0.25)
    parts = plan_report.parts(planned._replace(program=program), 1.0, assume)
    attention, others, matmul = parts["LLM: attention, forward"], parts["other"], parts[OPTIMIZER]
    assert attention.estimate > attention.roof > 0
    assert attention.estimate == pytest.approx(attention.flops / (0.01 * 197e12))
    assert others.estimate > others.compiler > 30_000 / 1.5e9 > others.roof
    assert matmul.estimate == pytest.approx(4 * matmul.bytes / 819e9)
    assert matmul.compiler == matmul.roof == pytest.approx(matmul.bytes / 819e9)


def test_links_of_a_ring_and_of_a_line():
    ring = plan_topology.is_ring
    slice_ = plan_topology.parse("v5e:16x16")
    line = [(x, 3) for x in range(16)]
    assert ring(slice_, line) and not ring(slice_, line[:8])
    assert ring(slice_, [(x, y) for x in range(4) for y in range(2)])
    assert not ring(plan_topology.parse("v5e:8x8"), line[:8])
    assert ring(plan_topology.parse("v5p:4x4x4"), [(0, 0, z) for z in range(4)])
    assert ring(plan_topology.parse("h100:8x8"), [(), ()])


def test_a_line_sends_at_half_the_rate_of_a_ring_and_the_chip_waits(planned):
    """All 90 GB that a ring sends in a second: over 8 of 8 chips in a line, then between slices."""
    assume = plan_report.Assumptions(link=1.0)

    def send(between: bool) -> plan_collectives.Collective:
        shape = hlo.Shape("u8", (90_000_000_000,), False)
        return plan_collectives.Collective("send", (shape,), (0, 1), 1.0, between, True, "")

    assert plan_report.link_seconds(planned, send(False), assume) == pytest.approx(1.0)
    assert plan_report.link_seconds(planned, send(True), assume) == pytest.approx(90 / 3.1)
