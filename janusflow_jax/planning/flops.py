"""Operations of a traced computation, counted on its jaxpr, beside the analytic count.

XLA's own count takes the body of a scan once and sees nothing inside a Pallas kernel. So the step
is traced with XLA's attention and its jaxpr is walked: matmuls and convolutions, two operations
per multiply-add, scans times their length. Element-wise work is not counted, as in
`training/flops.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from janusflow_jax.config import TrainConfig, parts as parts_lib
from janusflow_jax.models import splash
from janusflow_jax.planning import compile as plan_compile, hlo
from janusflow_jax.training import cross_entropy, flops, step as train_step


def count(closed: core.ClosedJaxpr, while_trips: float = 1.0, platform: str = "tpu") -> float:
    """Operations of the matmuls and convolutions of a closed jaxpr, over all devices.

    Args:
      closed: from `jit(f).trace(...).jaxpr`; what no output needs is dropped, as XLA does.
      while_trips: iterations of every loop whose number depends on data.
      platform: whose branch of `lax.platform_dependent` runs.
    """
    jaxpr = closed.jaxpr
    alive, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), True)
    return _walk(alive, while_trips, platform)


def _walk(jaxpr: Any, trips: float, platform: str) -> float:
    """Args: jaxpr: a `core.Jaxpr`, whose type does not say that its values have shapes."""
    total = 0.0
    for eqn in jaxpr.eqns:
        p = eqn.params
        match eqn.primitive.name:
            case "dot_general":
                (lhs, _), _ = p["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                macs = math.prod(shape[i] for i in lhs)
                total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * macs
            case "conv_general_dilated":
                # Zeros of a dilation are not counted; zeros of padding are.
                kernel = eqn.invars[1].aval.shape
                _, *spec = p["dimension_numbers"].rhs_spec  # (out features, in features, *space)
                macs = math.prod(kernel[i] for i in spec) / math.prod(p["lhs_dilation"])
                total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * macs
            case "cond":
                branches = p["branches"]
                if platforms := p.get("branches_platforms"):  # one of them runs there
                    runs = [names is None or platform in names for names in platforms]
                    branches = [branches[runs.index(True)]]
                total += max(_walk(b.jaxpr, trips, platform) for b in branches)
            case "while":
                total += trips * _walk(p["body_jaxpr"].jaxpr, trips, platform)
            case name:
                times = 1
                if name == "scan":
                    times = p["length"]
                elif name == "shard_map":
                    times = p["mesh"].size  # the body is the work of one device
                for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):  # not a custom derivative's rules
                    inner = p.get(key)
                    if inner is not None:
                        total += times * _walk(getattr(inner, "jaxpr", inner), trips, platform)
    return total


class Budget(NamedTuple):
    """Operations of a program over all devices, by an analytic count and by its jaxpr."""

    useful: float  # what utilization counts (`training/flops.py`)
    overhead: dict[str, float]  # the others by cause
    counted: float  # on the jaxpr

    @property
    def total(self) -> float:
        """Of the analytic count."""
        return self.useful + sum(self.overhead.values())

    @property
    def difference(self) -> float:
        """Of the two counts, relative."""
        return self.counted / self.total - 1


TEXT = {"generate": (80, 0), "understand": (200, 100)}
"""Text tokens of a typical sample, and the targets among them (benchmarks/RESULTS.md)."""
FULL_ROWS = 0.929  # share of a row of images that images and their text use (the same page)


def rows_of(text: float) -> tuple[float, float]:
    """Rows of images and rows of text for each row's worth of positions that samples use.

    Text is put behind images until half of it has rows of its own (data/rows.py).

    Args: text: its share of the mixture.
    """
    images = (1 - text) / FULL_ROWS
    return images, text - min(text / 2, images - (1 - text))


def text_share(cfg: TrainConfig) -> float:
    """The share of text in the config's last mixture."""
    _, weights = cfg.data.phases()[-1]
    text = sum(w for w, s in zip(weights, cfg.data.sources, strict=True) if s.task not in TEXT)
    return text / sum(weights)


def sample_length(cfg: TrainConfig, task: str) -> int:
    """Positions of a typical sample; text fills a row."""
    if task not in TEXT:
        return cfg.data.row_len
    return min(TEXT[task][0] + cfg.model.slot_len, cfg.data.row_len)


def typical(cfg: TrainConfig) -> flops.Work:
    """The contents of a typical batch of the config's last mixture."""
    _, weights = cfg.data.phases()[-1]
    full = 1 / sum(rows_of(text_share(cfg)))
    total = cfg.batch_rows * cfg.data.row_len * full
    positions = pairs = targets = 0.0
    images = dict.fromkeys(TEXT, 0.0)
    for weight, source in zip(weights, cfg.data.sources, strict=True):
        share = total * weight / sum(weights)
        length = sample_length(cfg, source.task)
        wanted = TEXT[source.task][1] if source.task in TEXT else length
        samples = share / length
        positions += share
        pairs += samples * length * (length + 1) / 2
        targets += samples * wanted
        if source.task in images:
            images[source.task] += samples
    slots = cfg.batch_rows * (cfg.data.gen_slots + cfg.data.und_slots)
    used = sum(images.values())
    return flops.Work(
        positions=int(positions),
        pairs=pairs,
        targets=int(targets),
        gen_images=int(images["generate"]),
        und_images=int(images["understand"]),
        padding=1 - full,
        idle_slots=1 - used / slots if slots else 0.0,
        cached=flops.CACHED.intersection(plan_compile.batch_shapes(cfg)),
    )


def budget(cfg: TrainConfig, mesh: Mesh) -> Budget:
    """Splits the operations of a train step by cause, beside the count of its jaxpr.

    The step is traced with XLA's attention, and its head runs as often as typical rows need.
    """
    cfg = dataclasses.replace(cfg, attention="xla")
    state, batch = plan_compile.state_shapes(cfg), plan_compile.batch_shapes(cfg)
    with jax.set_mesh(mesh):
        jaxpr = train_step.jit_train_step(cfg, mesh, state, batch).trace(state, batch).jaxpr
    positions, passes = head_work(cfg, mesh)
    trained = parts_lib.trained_parts(cfg)
    work = typical(cfg)
    rows, length = cfg.batch_rows, cfg.data.row_len

    def cost(w: flops.Work) -> float:
        return w.flops(cfg.model, trained, bool(cfg.loss.repa_weight and cfg.data.gen_slots))

    def more(**changes: Any) -> tuple[flops.Work, float]:
        after = work._replace(**changes)
        return after, cost(after) - cost(work)

    useful = cost(work)
    work, padding = more(positions=rows * length)
    work, pairs = more(pairs=float(rows * length * length))
    work, idle = more(gen_images=rows * cfg.data.gen_slots, und_images=rows * cfg.data.und_slots)
    idle -= flops.siglip(cfg.model) * rows * shared_slots(cfg, work.cached)
    work, head = more(targets=positions)
    overhead = {
        "padding": padding,
        "attention across samples and to later positions": pairs,
        "image encoders on slots without an image": idle,
        "the head where there is no target": head,
        "rotary positions by matmuls, on TPUs": 2 * rotary(cfg),
        "recomputation (remat)": recomputed(cfg, trained),
    }
    return Budget(useful, overhead, count(jaxpr, while_trips=float(passes)))


def rotary(cfg: TrainConfig) -> float:
    """Operations of one pass of `layers.swap_by_matmul` over all queries and keys."""
    m = cfg.model.llm
    per_position = 2.0 * m.num_layers * (m.num_heads + m.num_kv_heads) * m.head_dim**2
    return per_position * cfg.batch_rows * cfg.data.row_len


def shared_slots(cfg: TrainConfig, cached: frozenset[str]) -> int:
    """Slots of a row whose one SigLIP pass serves understanding and REPA."""
    model, data = cfg.model, cfg.data
    if cached & {"repa_target", "und_features"}:
        return 0
    uses_both = data.gen_slots and data.und_slots and cfg.loss.repa_weight
    if not uses_both or model.und_encoder != "siglip" or model.repa_target == "siglip":
        return 0
    return data.gen_slots + data.und_slots - data.num_slots


def head_work(cfg: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """Positions of a step that the head runs on; passes of its loop in one accumulation step."""
    accum = cfg.optim.accum_steps
    with jax.set_mesh(mesh):
        positions, passes = cross_entropy.head_positions(
            cfg.model.llm.vocab_size,
            cfg.batch_rows // accum,
            cfg.data.row_len,
            cfg.loss.ce_chunk,
            typical(cfg).targets // accum,
        )
    return positions * accum, passes


def recomputed(cfg: TrainConfig, trained: set[str]) -> float:
    """Operations that the backward pass runs again: whole blocks except their last matmul, whose
    result no gradient needs; of blocks that keep their matmul results ("names"), attention's scores
    in XLA's form."""
    if cfg.remat == "none":
        return 0.0
    m, und = cfg.model.llm, cfg.model.und
    positions = cfg.batch_rows * cfg.data.row_len
    attention_again = flops.attention_per_pair(cfg.model) * positions * cfg.data.row_len
    if cfg.remat == "names":
        last = 2.0 * m.num_layers * m.width * m.mlp_width * positions
        total = attention_again / 2 + (last if m.norms == "post" else 0.0)
    else:
        kernels = flops.llm_kernel(cfg.model)
        if m.norms == "pre":  # the gradient of a norm behind the last matmul needs its result
            kernels -= m.num_layers * m.width * m.mlp_width
        total = 2.0 * kernels * positions + attention_again + rotary(cfg)
    if "und_encoder" in trained and cfg.model.und_encoder == "siglip":
        last = 2.0 * und.num_layers * und.num_tokens * und.width * und.mlp_width
        patches = 2.0 * und.num_tokens * 3 * und.patch_size**2 * und.width
        again = flops.siglip(cfg.model) - last - patches
        total += again * cfg.batch_rows * cfg.data.und_slots
    return total


MATMULS = {
    "splash_forward": 2,
    "splash_backward": 5,
    "flash_forward": 2,
    "flash_queries": 3,
    "flash_keys": 4,
}
"""Matmuls for each pair of positions in the kernels of attention, by a part of their names."""


def attention_kernel(op_name: str, shapes: Sequence[hlo.Shape], length: int, share: float) -> float:
    """Operations of one run of a kernel of attention on a device.

    Args:
      shapes: of its operands; the first of numbers with more than two dimensions are the queries.
      length: of a row.
      share: of the pairs of positions in a row that the kernel computes.
    """
    queries = next(s for s in shapes if len(s.dims) > 2 and s.type in ("bf16", "f32"))
    matmuls = next((n for name, n in MATMULS.items() if name in op_name), 0)
    return 2.0 * matmuls * math.prod(queries.dims) * length * share


def attention_share(cfg: TrainConfig, rows: int, chips: int) -> float:
    """Share of the pairs of positions that the kernel computes on the slowest chip.

    All wait for the chip with the most rows of text, because one long text has pairs in every block
    up to the diagonal. A source's rows come at even distances (`data.mixture.interleave`) and a
    chip's rows follow one another, so two chips differ by at most one row of text.

    Args:
      rows: of each chip.
      chips: that have different rows.
    """
    length, block = cfg.data.row_len, splash.block_size(cfg.data.row_len)

    def share(task: str) -> float:
        """Of a row of typical samples."""
        sample = sample_length(cfg, task)
        ids = np.arange(length)[None] // sample + 1
        return float(splash.executed_blocks(ids * (ids <= length // sample), block).mean())

    images, text = rows_of(text_share(cfg))
    p = text / (images + text)
    more, least = math.modf(rows * p)
    most = least + min(chips * more, 1.0)  # the expected value, where few chips have few rows
    others = share("generate" if cfg.data.gen_slots else "understand") if p < 1 else 0.0
    return float(most * share("text") + (rows - most) * others) / rows
