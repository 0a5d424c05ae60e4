"""Every configuration type of the project, and the model sizes. Standard library only.

A config is built once by a file in `configs/` (`get_config(arg)`), may be changed by flags
(`--config.optim.lr=3e-4`), is checked by `validate`, and never changes afterwards: it is hashed
into compiled functions. Off is written 0 or '' because a flag cannot set None.
"""

import dataclasses
import difflib
import json
from typing import Any

from janusflow_jax.config.errors import ConfigError
from janusflow_jax.config.model import (
    MODEL_PARTS,
    GenConfig,
    LlamaConfig,
    ModelConfig,
    RepaConfig,
    SiglipConfig,
    VaeConfig,
    dataclass,
)

OPTIMIZERS = ("adamw", "muon")
LORA_TARGETS = {
    "q": "attn",
    "k": "attn",
    "v": "attn",
    "o": "attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}
"""The LLM's matmuls that may have an adapter, and which part of a block they are in."""


@dataclass
class SourceConfig:
    """One data source of the mixture."""

    name: str = ""
    path: str = ""  # folder of a prepared tfds data set (array_record)
    split: str = "train"
    task: str = "generate"  # generate | understand | text
    format: str = "chat"  # chat | plain
    weight: float = 1.0  # share of positions
    weight_after: float = -1.0  # from data.change_row on; -1: the same
    fields: tuple[tuple[str, str], ...] = ()  # (ours, the data set's) where names differ
    cache: str = ""  # folder of tools/cache_latents.py; '': encoders run in every step


SOURCE_FIELDS = ("sources", "heldout")
"""Fields that hold several of them; in a flag `sources[0]` is the first."""


@dataclass
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    row_len: int = 4096
    gen_slots: int = 6
    und_slots: int = 6
    change_row: int = 0  # from this row (step x batch_rows) on `weight_after` holds; 0: never
    drop_prompt: float = 0.1
    seed: int = 0
    num_threads: int = 2
    max_bad_share: float = 0.01  # of samples; above it (and above 20 bad ones) the run stops
    cached_features: bool = True  # REPA reads them where caches have them; off: SigLIP runs

    @property
    def num_slots(self) -> int:
        return max(self.gen_slots, self.und_slots)

    def phases(self) -> list[tuple[int, list[float]]]:
        """(first row, weight of every source) of each mixture of the run, in order."""
        before = [s.weight for s in self.sources]
        after = [s.weight if s.weight_after < 0 else s.weight_after for s in self.sources]
        return [(0, before)] + ([(self.change_row, after)] if self.change_row > 0 else [])


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw (the paper's) | muon (kernels by Muon, the rest by AdamW)
    lr: float = 1e-4
    warmup_steps: int = 2000
    decay_steps: int = 0  # linear decay to 0 over the last steps; 0: constant, as the paper
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.99
    accum_steps: int = 1
    moments_dtype: str = "float32"  # | bfloat16: AdamW's moments in half the memory


@dataclass
class LossConfig:
    ar_weight: float = 1.0
    rf_weight: float = 1.0
    repa_weight: float = 1.0  # 0: no REPA head, no capture in the LLM
    norm: str = "per_task"  # per_task | per_sample
    time: str = "logit_normal"  # logit_normal | uniform
    time_shift: float = 1.0
    vae_mode: bool = False  # True: the posterior's mode instead of a sample
    ce_chunk: int = 512  # positions of a device that the LLM's head takes at a time; 0: all


@dataclass
class MeshConfig:
    data: int = -1  # rows, over all slices; -1: what is left
    fsdp: int = 1  # rows and parameters
    tensor: int = 1
    slices: int = 0  # TPU slices joined by a slow network, a part of `data`; 0: as there are


@dataclass
class LoraConfig:
    """Low-rank adapters of the LLM; what `train_parts` names is trained beside them."""

    rank: int = 0  # 0: none
    alpha: float = 32.0  # an adapter counts alpha / rank
    targets: tuple[str, ...] = tuple(LORA_TARGETS)


@dataclass
class EvalConfig:
    """Held-out losses in the loop, of fixed rows with fixed times and noise, EMA beside raw."""

    sources: tuple[SourceConfig, ...] = ()  # each measured alone; none: off
    rows: int = 8  # packed rows of each, its first
    every_steps: int = 0  # besides the start and the end; 0: no more
    seed: int = 0  # of rows, times and noise: not the run's
    max_rise: float = 0.0  # of a loss over its value at the start (0.1: a tenth); 0: no guard
    stop_on_rise: bool = False  # end the run then, saved; else it is only said, loudly


@dataclass
class TrainConfig:
    """A whole run. `init[part]` is 'fresh' or a path that `checkpoint.load_model` accepts."""

    name: str = ""
    workdir: str = ""  # '': runs/<name>
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    start: str = ""  # a model folder or a run: every part that `init` does not name and it has
    init: tuple[tuple[str, str], ...] = ()  # (part, 'fresh' | path); the rest: `start`, or fresh
    made_by: tuple[tuple[str, str], ...] = ()  # (path, command that makes it), for messages
    tokenizer: str = ""  # folder with tokenizer and processor files; '': from init's model folder
    allow_fresh: bool = False
    train_parts: tuple[str, ...] = MODEL_PARTS  # or paths below them: llm/layers/block/attn
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    frozen_dtype: str = "float32"  # | bfloat16: what is not trained, in half the memory
    batch_rows: int = 512
    num_steps: int = 1000
    seed: int = 0
    dtype: str = "float32"  # activations: float32 | bfloat16
    remat: bool = True
    attention: str = "auto"  # | xla | cudnn (GPU, bfloat16) | splash (TPU)
    max_bad_steps: int = 10  # in a row with a non-finite loss or gradient; then the run stops
    peak_tflops: float = 0.0  # of one device, for utilisation; 0: by its kind, where it is known
    log_every_steps: int = 20
    save_every_steps: int = 1000
    keep_checkpoints: int = 2  # the newest
    keep_every_steps: int = 0  # checkpoints of multiples of it stay for good; 0: none
    watchdog_s: float = 0.0  # stacks are printed when no step ends for so long; 0: off
    watchdog_exit: bool = False  # and the run ends then, for whoever restarts it
    evaluate: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sheet_every_steps: int = 0
    tensorboard: bool = False
    prompts: tuple[str, ...] = ()  # painted on every sheet
    heldout: tuple[SourceConfig, ...] = ()  # pictures captioned beside the sheet
    heldout_captions: int = 24
    sheet_cfg_weight: float = 2.0
    sheet_num_steps: int = 30


def check_field(path: str) -> None:
    """Raises ConfigError when `path` ('optim.lr', 'data.sources[0].path') is no field of a
    TrainConfig, and names those that are there."""
    node: Any = TrainConfig()
    for depth, part in enumerate(path.split(".")):
        name, _, index = part.partition("[")
        known = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if name not in known:
            where = ".".join(["config", *path.split(".")[:depth]])
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}: expected one of {', '.join(known)}; got {name!r}{hint}")
        node = SourceConfig() if index and name in SOURCE_FIELDS else getattr(node, name)


def raise_problems(what: str, problems: list[str]) -> None:
    """Raises one ConfigError that lists every problem; does nothing when there is none."""
    if problems:
        raise ConfigError(f"{what} cannot work:\n" + "\n".join(f"  - {p}" for p in problems))


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`. Unknown keys are an error, missing ones take the default."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(
            f"{where or cls.__name__}: unknown keys {unknown}; known are {sorted(fields)}"
        )
    types = {
        "llm": LlamaConfig,
        "und": SiglipConfig,
        "gen": GenConfig,
        "vae": VaeConfig,
        "repa": RepaConfig,
        "model": ModelConfig,
        "data": DataConfig,
        "optim": OptimConfig,
        "loss": LossConfig,
        "mesh": MeshConfig,
        "evaluate": EvalConfig,
        "lora": LoraConfig,
    }
    out = {}
    for name, value in values.items():
        if name in SOURCE_FIELDS:
            value = tuple(from_dict(SourceConfig, v, f"{where}{name}.") for v in value)
        elif isinstance(value, dict):
            value = from_dict(types[name], value, f"{where}{name}.")
        elif isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        out[name] = value
    return cls(**out)


def parse_arg(arg: str | None, known: dict[str, str]) -> set[str]:
    """Splits the part of `--config=file.py:a,b` after the colon.

    Args:
      arg: comma-separated names, or None.
      known: name -> what it does.
    Raises:
      ConfigError: a name that is not known (lists the known).
    """
    names = {n.strip() for n in (arg or "").split(",") if n.strip()}
    unknown = sorted(names - set(known))
    if unknown:
        listed = ", ".join(f"{n} ({what})" for n, what in known.items()) or "none"
        raise ConfigError(f"config argument: unknown {unknown}; known are: {listed}")
    return names
