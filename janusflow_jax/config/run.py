"""The config of a training run.

A file in `configs/` builds it (`get_config(arg)`), flags may change it (`--config.optim.lr=3e-4`),
`checks.train_problems` checks it, and then it never changes: it is hashed into compiled functions.
"Off" is 0 or '', because a flag cannot set None.
"""

import dataclasses
import itertools
from typing import Any

from janusflow_jax.config.fields import (
    between,
    choice,
    dataclass,
    limited,
    positive,
    seed,
    share,
    zero_or_more,
)
from janusflow_jax.config.model import ATTENTION, ModelConfig
from janusflow_jax.config.parts import LORA_TARGETS, MODEL_PARTS, top


def _minus_one_or(low: int, default: float | int) -> Any:
    return limited(default, lambda x: x == -1 or x >= low, f"-1, or {low} or more")


@dataclass
class SourceConfig:
    """One data source of the mixture."""

    name: str = ""
    path: str = ""  # folder of a prepared data set
    split: str = "train"
    task: str = choice("generate", "understand", "text")
    format: str = choice("chat", "plain")
    weight: float = zero_or_more(1.0)  # share of positions
    weight_after: float = _minus_one_or(0, -1.0)  # from data.change_row on; -1: the same
    # (ours, the data set's) where names differ
    fields: tuple[tuple[str, str], ...] = limited(
        (),
        lambda pairs: len(dict(pairs)) == len(pairs),
        "pairs (our name, the data set's name), each of ours once",
    )
    cache: str = ""  # folder of tools/cache_latents.py; '': the encoders run in every step

    @property
    def label(self) -> str:
        """Its name in messages and metrics."""
        return self.name or f"{self.path}:{self.split}:{self.task}"


@dataclass
class DataConfig:
    sources: tuple[SourceConfig, ...] = limited((), bool, "at least one source")
    row_len: int = positive(4096)
    gen_slots: int = zero_or_more(6)
    und_slots: int = zero_or_more(6)
    # from this row (step x batch_rows) on `weight_after` holds; 0: never
    change_row: int = zero_or_more(0)
    skip_rows: tuple[tuple[int, int], ...] = limited(
        (),
        lambda pairs: (
            all(0 <= first < end for first, end in pairs)
            and all(a[1] <= b[0] for a, b in itertools.pairwise(pairs))
        ),
        "pairs (first row, row after the last), ascending, which are left out",
    )
    drop_prompt: float = share(0.1)
    seed: int = seed()
    num_threads: int = zero_or_more(2)
    # of samples; above it (and above 20 bad ones) the run stops
    max_bad_share: float = between(0.01, 0, 1)
    # How samples become rows. A resumed run keeps its own: 1 if it began before there was a 2.
    packing: int = limited(2, lambda version: version in (1, 2), "1 or 2")
    cached_features: bool = True  # REPA reads them where caches have them; off: SigLIP runs

    @property
    def num_slots(self) -> int:
        return max(self.gen_slots, self.und_slots)

    def row_at(self, position: int) -> int:
        """The row at a position of the run, counted without `skip_rows`."""
        for first, end in self.skip_rows:
            if position >= first:
                position += end - first
        return position

    def position_of(self, row: int) -> int:
        """The inverse of `row_at`; for a row that is left out, that of the next one."""
        return row - sum(min(row, end) - first for first, end in self.skip_rows if first < row)

    def phases(self) -> list[tuple[int, list[float]]]:
        """(first row, weight of every source) of each mixture of the run, in order."""
        before = [s.weight for s in self.sources]
        after = [s.weight if s.weight_after < 0 else s.weight_after for s in self.sources]
        return [(0, before)] + ([(self.change_row, after)] if self.change_row > 0 else [])


@dataclass
class OptimConfig:
    name: str = choice("adamw", "muon")  # muon: kernels by Muon, the rest by AdamW
    lr: float = positive(1e-4)
    warmup_steps: int = zero_or_more(2000)
    # linear decay to 0 over the last steps; 0: constant, as the paper
    decay_steps: int = zero_or_more(0)
    b1: float = share(0.9)
    b2: float = share(0.95)
    eps: float = positive(1e-8)
    weight_decay: float = zero_or_more(0.0)
    clip_norm: float = zero_or_more(1.0)  # of the gradients of a step; 0: no clipping
    # skip a step whose gradient norm is above this multiple of its running mean; 0: only non-finite
    max_norm_ratio: float = zero_or_more(0.0)
    ema: float = share(0.99)
    accum_steps: int = positive(1)
    moments_dtype: str = choice("float32", "bfloat16")  # bfloat16: AdamW only, half the memory


@dataclass
class LossConfig:
    ar_weight: float = zero_or_more(1.0)
    rf_weight: float = zero_or_more(1.0)
    repa_weight: float = zero_or_more(1.0)  # 0: no REPA head, no capture in the LLM
    norm: str = choice("per_task", "per_sample", "mixture")  # see training.losses.weights
    time: str = choice("logit_normal", "uniform")
    time_shift: float = positive(1.0)
    vae_mode: bool = False  # True: the posterior's mode instead of a sample
    # positions of a device that the LLM's head takes at a time; 0: all
    ce_chunk: int = zero_or_more(512)


@dataclass
class MeshConfig:
    data: int = _minus_one_or(1, -1)  # rows, over all slices; -1: what is left
    fsdp: int = _minus_one_or(1, 1)  # rows and parameters
    tensor: int = _minus_one_or(1, 1)
    # TPU slices joined by a slow network, a part of `data`; 0: as there are
    slices: int = zero_or_more(0)


@dataclass
class LoraConfig:
    """Low-rank adapters of the LLM, trained beside what `train_parts` names."""

    rank: int = zero_or_more(0)  # 0: no adapters
    alpha: float = positive(32.0)  # adapters are scaled by alpha / rank
    targets: tuple[str, ...] = limited(
        tuple(LORA_TARGETS),
        lambda names: names and {*names} <= {*LORA_TARGETS},
        f"some of {tuple(LORA_TARGETS)}",
    )


@dataclass
class EvalConfig:
    """Held-out losses during training: fixed rows, times and noise; raw and EMA weights."""

    sources: tuple[SourceConfig, ...] = ()  # each measured alone; none: off
    rows: int = positive(8)  # packed rows of each, its first
    every_steps: int = zero_or_more(0)  # beside the start and the end
    seed: int = seed()  # of rows, times and noise: not the run's
    max_rise: float = zero_or_more(0.0)  # of a loss above its start (0.1: 10 %); 0: no guard
    stop_on_rise: bool = False  # save and end the run then; else only log a warning


@dataclass
class TrainConfig:
    """A whole run. The paths in `start` and `init` are model folders, runs or checkpoints."""

    name: str = limited("", bool, "a name for the run")
    workdir: str = ""  # '': runs/<name>
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    start: str = ""  # the source of every part that it has and `init` does not name
    init: tuple[tuple[str, str], ...] = ()  # (part, 'fresh' | path); the rest: `start`, or fresh
    made_by: tuple[tuple[str, str], ...] = ()  # ignored since 0.2; remove in 0.3
    tokenizer: str = ""  # folder with tokenizer and processor files; '': from init's model folder
    allow_fresh: bool = False
    train_parts: tuple[str, ...] = limited(
        MODEL_PARTS,
        lambda paths: {top(path) for path in paths} <= {*MODEL_PARTS},
        f"{MODEL_PARTS} or paths below them, such as llm/layers/block/attn",
    )
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    frozen_dtype: str = choice("float32", "bfloat16")  # of parts that are not trained
    batch_rows: int = positive(512)
    num_steps: int = positive(1000)
    seed: int = seed()
    dtype: str = choice("float32", "bfloat16")  # of activations
    # what the backward pass computes again: whole blocks, what is cheap, or nothing
    remat: str = choice("full", "names", "none")
    # off: the step has a copy of the program for each layer; faster on CPU, and slower to compile
    scan_layers: bool = True
    # BF16_BF16_F32: products of float32 matrices from operands rounded to bfloat16, added in
    # float32; twice as fast on one CPU device with AVX-512 BF16 or AMX, and without effect on
    # several; '': JAX's own
    matmul_precision: str = choice("", "BF16_BF16_F32")
    attention: str = choice("auto", *ATTENTION)
    # so many skipped steps in a row stop the run; 0: never
    max_bad_steps: int = zero_or_more(10)
    peak_tflops: float = zero_or_more(0.0)  # of one device, for utilization; 0: by its kind
    log_every_steps: int = zero_or_more(20)  # beside the first and the last; 0: those only
    save_every_steps: int = zero_or_more(1000)
    keep_checkpoints: int = zero_or_more(2)  # the newest
    keep_every_steps: int = zero_or_more(0)  # checkpoints of its multiples are never deleted
    watchdog_s: float = zero_or_more(0.0)  # print all stacks when no step ends for so long
    watchdog_exit: bool = False  # and exit then, so that a supervisor restarts the run
    evaluate: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sheet_every_steps: int = zero_or_more(0)
    tensorboard: bool = False
    wandb: str = ""  # project at Weights & Biases; '': off
    prompts: tuple[str, ...] = ()  # generated on every sheet
    heldout: tuple[SourceConfig, ...] = ()  # images captioned beside the sheet
    heldout_captions: int = zero_or_more(24)
    sheet_cfg_weight: float = zero_or_more(2.0)
    sheet_num_steps: int = between(30, 1, 10_000)

    @property
    def distills(self) -> bool:
        """Whether the run trains a student of the model that it starts from."""
        return self.model.student.steps > 0 and self.data.gen_slots > 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "remat":  # it was True or False in 0.1
            value = {"true": "full", "false": "none"}.get(str(value).lower(), value)
        object.__setattr__(self, name, value)


MAY_CHANGE = tuple(
    (
        # Memory and speed: the result stays the same up to rounding.
        "mesh optim.accum_steps loss.ce_chunk remat scan_layers attention data.num_threads "
        # Types of stored values: restoring rounds them to the new type.
        "frozen_dtype optim.moments_dtype "
        # What is skipped from now on, and when the run ends.
        "optim.max_norm_ratio num_steps max_bad_steps data.max_bad_share watchdog_s watchdog_exit "
        # What it writes and measures.
        "workdir made_by peak_tflops log_every_steps tensorboard wandb evaluate prompts heldout "
        "heldout_captions sheet_every_steps sheet_cfg_weight sheet_num_steps save_every_steps "
        "keep_checkpoints keep_every_steps"
    ).split()
)
"""Fields that a resumed run may change. Any other change makes it another run."""

MAY_CHANGE_IN_BRANCH = tuple(
    (
        "name optim.lr optim.warmup_steps optim.decay_steps optim.b1 optim.b2 optim.weight_decay "
        "optim.clip_norm data.sources data.change_row data.skip_rows data.drop_prompt"
    ).split()
)
"""Fields that a branch of a run (`--branch-from`) may change beside `MAY_CHANGE`."""
