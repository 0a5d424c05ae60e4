"""Operations of a traced computation, counted on its jaxpr, beside the analytic count.

XLA's own count takes the body of a scan once and sees nothing inside a Pallas kernel. So the step
is traced with XLA's attention and its jaxpr is walked: matmuls and convolutions, two operations
per multiply-add, scans times their length. Element-wise work is not counted, as in
`training/flops.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax.interpreters import partial_eval

from janusflow_jax.config import TrainConfig, parts as parts_lib
from janusflow_jax.models import attention
from janusflow_jax.training import flops


def count(closed: Any, while_trips: float = 1.0, platform: str = "tpu") -> float:
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
                branches = _branches(p["branches"], p.get("branches_platforms"), platform)
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


def _branches(branches: Any, platforms: Any, platform: str) -> list[Any]:
    """Those that may run: all, or the one of the platform where that decides."""
    if platforms is None:
        return list(branches)
    return [next(b for b, p in zip(branches, platforms, strict=True) if p is None or platform in p)]


class Budget(NamedTuple):
    """Operations of one step over all devices: the useful ones, and the others by cause."""

    useful: float  # `flops.train_flops` of a typical batch: what utilization counts
    padding: float  # positions that belong to no sample
    pairs: float  # attention between positions that are masked
    idle_slots: float  # image encoders on slots without an image
    head: float  # the head on positions without a target
    recomputed: float  # forward passes that rematerialization runs again
    jaxpr: float  # counted on the jaxpr; all others sum to `analytic`

    @property
    def analytic(self) -> float:
        return sum(self[:6])

    @property
    def difference(self) -> float:
        """Of the two counts, relative."""
        return self.jaxpr / self.analytic - 1


TEXT = {"generate": (80, 0), "understand": (200, 100)}
"""Text tokens of a typical sample, and the targets among them (benchmarks/RESULTS.md)."""
FILL = 0.988  # share of positions that belong to a sample (benchmarks/RESULTS.md)


def typical(cfg: TrainConfig) -> flops.Work:
    """The contents of a typical batch of the config's last mixture."""
    _, weights = cfg.data.phases()[-1]
    total = cfg.batch_rows * cfg.data.row_len * FILL
    positions = pairs = targets = 0.0
    images = dict.fromkeys(TEXT, 0.0)
    for weight, source in zip(weights, cfg.data.sources, strict=True):
        share = total * weight / sum(weights)
        text, wanted = TEXT.get(source.task, (cfg.data.row_len, cfg.data.row_len))
        length = min(text + (cfg.model.slot_len if source.task in TEXT else 0), cfg.data.row_len)
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
        padding=1 - FILL,
        idle_slots=1 - used / slots if slots else 0.0,
    )


def budget(cfg: TrainConfig, jaxpr: Any, head_positions: int, trips: float) -> Budget:
    """Splits the operations of a train step by cause, beside the count of its jaxpr.

    Args:
      jaxpr: of the step with XLA's attention.
      head_positions: on which the head runs, over all devices.
      trips: iterations of the head's loop.
    """
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
    work, head = more(targets=head_positions)
    return Budget(
        useful,
        padding,
        pairs,
        idle,
        head,
        recomputed(cfg, trained),
        count(jaxpr, while_trips=trips),
    )


def recomputed(cfg: TrainConfig, trained: set[str]) -> float:
    """Operations that the backward pass runs again: whole blocks except their last matmul, whose
    result no gradient needs."""
    if not cfg.remat:
        return 0.0
    m, und = cfg.model.llm, cfg.model.und
    positions = cfg.batch_rows * cfg.data.row_len
    kernels = flops.llm_kernel(cfg.model) - m.num_layers * m.width * m.mlp_width
    total = 2.0 * kernels * positions
    total += flops.attention_per_pair(cfg.model) * positions * cfg.data.row_len
    if "und_encoder" in trained and cfg.model.und_encoder == "siglip":
        last = 2.0 * und.num_layers * und.num_tokens * und.width * und.mlp_width
        patches = 2.0 * und.num_tokens * 3 * und.patch_size**2 * und.width
        again = flops.siglip(cfg.model) - last - patches
        total += again * cfg.batch_rows * cfg.data.und_slots
    return total


def executed(cfg: TrainConfig, work: Budget) -> float:
    """Operations over all devices with the attention that runs, not XLA's.

    Splash attention computes only the blocks on and below the diagonal. Its backward pass computes
    the scores twice: 7 matmuls per block where XLA's attention has 4.
    """
    if cfg.attention != "splash":
        return work.jaxpr
    length = cfg.data.row_len
    per_pass = flops.attention_per_pair(cfg.model) * cfg.batch_rows * length**2
    unit, block = attention.SPLASH_UNIT, attention.SPLASH_BLOCK
    blocks = length / (block if length % block == 0 else unit)
    forward = 2 if cfg.remat else 1
    splash_flops = per_pass * (forward + 7 / 2) * (blocks + 1) / (2 * blocks)
    return work.jaxpr - per_pass * (forward + 2) + splash_flops
