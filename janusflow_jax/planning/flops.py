"""Operations of a traced computation, counted on its jaxpr, beside what `flops.py` says of them.

XLA's own count takes the body of a scan once and sees nothing inside a Pallas kernel, so the step
is traced with XLA's attention and its jaxpr is walked: matmuls and convolutions, two operations a
multiply-add, scans times their length. Element-wise work is not counted; neither does `flops.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax.interpreters import partial_eval

from janusflow_jax.config import TrainConfig, parts as parts_lib
from janusflow_jax.models import splash
from janusflow_jax.training import flops


def count(closed: Any, while_trips: float = 1.0, platform: str = "tpu") -> float:
    """Matmul and convolution operations of a closed jaxpr, over all devices.

    Args:
      closed: of `jit(f).trace(...).jaxpr`; what no output needs is dropped first, as XLA does.
      while_trips: passes of every loop whose number depends on data.
      platform: whose branch of `lax.platform_dependent` runs.
    """
    jaxpr = closed.jaxpr
    alive, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), True)
    return _walk(alive, while_trips, platform)


def _walk(jaxpr: Any, trips: float, platform: str) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "conv_general_dilated":
            total += _conv(eqn)
        elif name == "cond":
            total += max(_walk(b.jaxpr, trips, platform) for b in _branches(eqn, platform))
        elif name == "while":
            total += trips * _walk(eqn.params["body_jaxpr"].jaxpr, trips, platform)
        else:
            times = 1.0
            if name == "scan":
                times = eqn.params["length"]
            elif name == "shard_map":  # its body is one device's
                times = eqn.params["mesh"].size
            for inner in _inner(eqn):
                total += times * _walk(inner, trips, platform)
    return total


def _branches(eqn: Any, platform: str) -> list[Any]:
    """What may run: all branches, or the one of the platform where that decides."""
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms is None:
        return list(branches)
    return [next(b for b, p in zip(branches, platforms, strict=True) if p is None or platform in p)]


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that run once when `eqn` runs; of a custom derivative only the function itself."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    found = [eqn.params[n] for n in names if eqn.params.get(n) is not None]
    return [getattr(j, "jaxpr", j) for j in found]


def _dot(eqn: Any) -> float:
    (lhs, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in lhs)


def _conv(eqn: Any) -> float:
    """Zeros that the padding or a dilation puts in are counted out only for the dilation."""
    p = eqn.params
    spec = p["dimension_numbers"].rhs_spec  # (out features, in features, *space)
    kernel = eqn.invars[1].aval.shape
    macs = math.prod(kernel[i] for i in spec[1:])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * macs / math.prod(p["lhs_dilation"])


class Budget(NamedTuple):
    """One step's operations over all devices: what is wanted, and what is done beside it."""

    useful: float  # `flops.train_flops` of a typical batch: what utilisation counts
    padding: float  # positions that belong to no sample
    pairs: float  # attention between positions that must not see each other
    idle_slots: float  # image encoders on slots without a picture
    head: float  # the head on positions without a target, and its gradient where it is frozen
    recomputed: float  # forward passes that rematerialisation runs again
    jaxpr: float  # counted on the jaxpr, head included; the others sum to `analytic`

    @property
    def analytic(self) -> float:
        return sum(self[:6])

    @property
    def difference(self) -> float:
        """Of the two counts, as a share."""
        return self.jaxpr / self.analytic - 1


# A sample's text tokens, and its targets among them: SPEC section 6 and benchmarks/RESULTS.md.
TEXT = {"generate": (80, 0), "understand": (200, 100)}
FILL = 0.988  # of positions belong to a sample


def typical(cfg: TrainConfig) -> flops.Work:
    """What a batch of the config's last mixture holds, by the lengths assumed above."""
    _, weights = cfg.data.phases()[-1]
    total = cfg.batch_rows * cfg.data.row_len * FILL
    positions = pairs = targets = 0.0
    images = dict.fromkeys(TEXT, 0.0)
    for weight, source in zip(weights, cfg.data.sources, strict=True):
        here = total * weight / sum(weights)
        text, asked = TEXT.get(source.task, (cfg.data.row_len, cfg.data.row_len))
        length = min(text + (cfg.model.slot_len if source.task in TEXT else 0), cfg.data.row_len)
        samples = here / length
        positions += here
        pairs += samples * length * (length + 1) / 2
        targets += samples * asked
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
    """Splits a train step's operations, and holds their sum against the jaxpr's.

    Args:
      jaxpr: of the step with XLA's attention.
      head_positions: on which the head runs, over all devices: `trips` of its loop.
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
    """Forward passes that a backward pass runs again: whole blocks but for their last matmul, whose
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
    """Operations that the chips do, over all devices: the jaxpr's, with the attention that runs.

    Splash attention does the blocks on and under the diagonal, and in its backward pass computes
    the scores again twice: 7 matmuls of a block where XLA's form has 4.
    """
    if cfg.attention != "splash":
        return work.jaxpr
    length = cfg.data.row_len
    per_pass = flops.attention_per_pair(cfg.model) * cfg.batch_rows * length**2
    blocks = length / (splash.BLOCK if length % splash.BLOCK == 0 else splash.UNIT)
    forward = 2 if cfg.remat else 1
    ours = per_pass * (forward + 7 / 2) * (blocks + 1) / (2 * blocks)
    return work.jaxpr - per_pass * (forward + 2) + ours
