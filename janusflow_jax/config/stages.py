"""What the paper's three stages and six ablations share: sizes, data sources, test twins.

Source: arXiv 2411.07975 section 4. Our choices where the paper gives no value, such as packed rows
of 4,096 positions and mixture ratios as shares of positions, are in docs/model.md.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import PurePath

from janusflow_jax import config as c
from janusflow_jax.config import files

ADAPTED = tuple(p for p in c.MODEL_PARTS if p not in ("llm", "und_encoder"))
"""What adaptation trains: the new parts. The language model and SigLIP stay frozen."""

TEST = "seconds on a CPU: a tiny model on the quick start's data, through the same code"
SIZE_256 = "256 px images instead of 384"
OWN = "the model of the run's start, of any size; start=DIR: of that start"
ARGUMENTS = {
    "own": OWN,
    "256": SIZE_256,
    "512": "512 px images instead of 384",
    "7b": "a language model of 7B parameters instead of 1.3B",
    "online": "the VAE runs in every step; else latents come from data/generate/latents",
    "test": TEST,
}
"""The arguments of the configs of the three stages."""
ROW_LEN = 4096
Shares = tuple[float | int, float | int]
START = "models/start"
OPENMOJI, OPENMOJI_HELDOUT = "data/openmoji", "heldout_pairs"
"""The data set of tools/prepare_openmoji.py, and its held-out split."""
OPENMOJI_PROMPTS = (
    "a red apple",
    "a red heart",
    "a red umbrella",
    "an orange pumpkin",
    "an orange cat",
    "an orange star",
    "a yellow banana",
    "a yellow moon",
    "a yellow car",
    "a green frog",
    "a green tree",
    "a green balloon",
    "a cyan fish",
    "a cyan drop",
    "a cyan crown",
    "a blue whale",
    "a blue book",
    "a blue mushroom",
    "a purple butterfly",
    "a purple key",
    "a purple rocket",
    "a pink pig",
    "a pink dress",
    "a pink turtle",
)
"""The quick start's 24 prompts, fixed before any training: every color three times, every class
once. The last prompt of each color is a (class, color) pair that no training split holds."""
ABLATIONS = {
    "A": "without REPA",
    "B": "a shared VAE + ConvNeXt encoder",
    "C": "a VAE + ConvNeXt encoder of its own for understanding",
    "D": "understanding only",
    "E": "generation only",
    "F": "all",
}
"""The ablations of the paper's table 5, by letter (configs/ablation.py, configs/emoji.py)."""
LONG_RUN_PROMPTS = (
    "a red apple on a wooden table",
    "a photo of a cat and a dog",
    "three green bottles on a shelf",
    "a blue car to the left of a yellow bus",
    "a portrait of an old sailor, oil painting",
    "a snowy mountain village at night",
    "a bowl of ramen, top view",
    "a street sign that says STOP",
)
"""What a long run generates images for: objects, counts, colors, places, styles, text."""
DATA = {"understand": "data/understand", "generate": "data/generate", "text": "data/text"}


def parse(arg: str | None, known: Mapping[str, str] = ARGUMENTS) -> tuple[set[str], str]:
    """The names in a config's argument, and the folder of `start=DIR` ('': the usual start).

    `start=DIR` means `own` too.
    """
    words, folders = c.parse_folders(arg, ("start",))
    names = c.parse_arg(",".join([*words, *(["own"] if folders else [])]), dict(known))
    return names, folders.get("start", "")


def run_name(stage: str, names: set[str], start: str = "") -> str:
    """'pretrain-online-own'; with `start=DIR` the folder's name stands in place of `own`."""
    if start:
        stage, names = f"{stage}-{PurePath(start).name}", names - {"own"}
    return "-".join([stage, *sorted(names)])


def model_of(path: str) -> c.ModelConfig:
    """The model of a model folder, a run or a checkpoint, as its JSON file has it.

    Raises:
      ConfigError: there is none.
    """
    for name, keys in {
        "model.json": ("config",),
        "config.json": ("model",),
        "run.json": ("config", "model"),
    }.items():
        file = files.resolve(path) / name
        if not file.exists():
            continue
        try:
            values = json.loads(file.read_text())
            for key in keys:
                values = values[key]
            return c.from_dict(c.ModelConfig, values)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise c.ConfigError(
                f"{file}: expected the config of a model; got {type(error).__name__}: {error}"
            ) from error
    raise c.ConfigError(
        f"{path}: expected a model folder or a run, whose model this one takes (own); found none: "
        "name another with start=DIR"
    )


def sources(weights: Mapping[str, Shares], form: str) -> tuple[c.SourceConfig, ...]:
    """One source for each task, with its shares of positions before and after `data.change_row`."""
    return tuple(
        c.SourceConfig(
            name=task,
            path=DATA[task],
            task=task,
            format="plain" if task == "text" else form,
            weight=float(before),
            weight_after=float(after),
        )
        for task, (before, after) in weights.items()
        if before or after > 0
    )


def stage(
    names: set[str],
    weights: Mapping[str, Shares],
    form: str,
    start: str,
    cached: bool = False,
    **fields: object,
) -> c.TrainConfig:
    """A run on packed rows, with the values that all stages share.

    Args:
      names: arguments of the config, some of `ARGUMENTS`.
      weights: task -> shares of positions (before, after the change; -1: the same).
      form: 'chat' or 'plain', of the sources with images.
      start: what the run starts from.
      cached: the source to generate reads latents from the folder `latents` of its data set.
      fields: other fields of TrainConfig.
    """
    sizes = [int(name) for name in names if name.isdigit()]
    if len(sizes) > 1:
        raise c.ConfigError(f"config argument: expected one image size; got {sorted(sizes)}")
    if "own" in names and (others := sorted(names & {"256", "512", "7b"})):
        raise c.ConfigError(
            f"config argument: expected own, whose start has all sizes, or {', '.join(others)}; "
            "got both: leave one out"
        )
    own = "own" in names
    model = model_of(start) if own else c.model_config("7b" if "7b" in names else "1p3b", *sizes)
    slots = max(1, ROW_LEN // (model.slot_len + 40))  # 40: a short prompt
    mixture = sources(weights, form)
    if cached:
        for source in mixture:
            source.cache = f"{source.path}/latents" if source.task == "generate" else ""
    tasks = {source.task for source in mixture}
    cfg = c.TrainConfig(
        model=model,
        start=start,
        data=c.DataConfig(
            sources=mixture,
            row_len=ROW_LEN,
            gen_slots=slots if "generate" in tasks else 0,
            und_slots=slots if "understand" in tasks else 0,
        ),
        mesh=c.MeshConfig(data=-1, fsdp=8, tensor=1),
        dtype="bfloat16",
        batch_rows=512,
        log_every_steps=20,
        save_every_steps=1000,
        keep_checkpoints=3,
    )
    for name, value in fields.items():
        setattr(cfg, name, value)
    return cfg


def long_run(cfg: c.TrainConfig) -> c.TrainConfig:
    """Adds what a run of days needs: held-out losses, images and TensorBoard to watch it,
    checkpoints to go back to, a watchdog, a guard against spikes, and threads that wait for records
    of a remote store.

    Every data set needs a split `heldout`.
    """
    cfg.data.num_threads = 16
    cfg.optim.max_norm_ratio = 10.0
    cfg.save_every_steps, cfg.keep_every_steps = 250, 10_000
    cfg.watchdog_s, cfg.watchdog_exit = 600.0, True
    held = tuple(
        dataclasses.replace(s, split="heldout", weight=1.0, weight_after=-1.0, cache="")
        for s in cfg.data.sources
    )
    cfg.evaluate = c.EvalConfig(sources=held, rows=256, every_steps=5000)
    cfg.sheet_every_steps = 5000
    cfg.prompts = LONG_RUN_PROMPTS if cfg.data.gen_slots else ()
    cfg.tensorboard = True
    return cfg


def test_twin(
    cfg: c.TrainConfig, own_folders: tuple[str, ...] = (), own_model: bool = False
) -> c.TrainConfig:
    """The same run at the size of a test; everything that is not a size stays, but TensorBoard.

    It has 4 steps, 2 of warm-up, and changes the mixture at the third step. It starts from fresh
    parameters unless `--config.start` names a run, and measures held-out losses on few rows, also
    in the middle.

    Args:
      own_folders: data sets that the user chose; all others become the quick start's.
      own_model: keep the start and its model.
    """

    def small(source: c.SourceConfig) -> c.SourceConfig:
        if source.path in own_folders:
            return source
        split = source.split if source.split == "train" else OPENMOJI_HELDOUT
        return dataclasses.replace(source, path=OPENMOJI, split=split, cache="")

    slots = 2
    if not own_model:
        cfg.model = dataclasses.replace(
            c.model_config("test"),
            name=f"{cfg.model.name}-test",
            und_encoder=cfg.model.und_encoder,
            repa_target=cfg.model.repa_target,
        )
        cfg.start, cfg.allow_fresh, cfg.tokenizer = "", True, "starts/emoji_llm/hub"
    cfg.data = dataclasses.replace(
        cfg.data,
        sources=tuple(small(s) for s in cfg.data.sources),
        row_len=slots * cfg.model.slot_len + 158,
        gen_slots=slots if cfg.data.gen_slots else 0,
        und_slots=slots if cfg.data.und_slots else 0,
        change_row=16 if cfg.data.change_row else 0,
    )
    held = tuple(small(s) for s in cfg.evaluate.sources)
    cfg.evaluate = dataclasses.replace(cfg.evaluate, sources=held, rows=8, every_steps=2)
    cfg.optim = dataclasses.replace(cfg.optim, warmup_steps=2)
    cfg.num_steps, cfg.batch_rows = 4, 8
    cfg.log_every_steps = cfg.save_every_steps = 1
    cfg.mesh = c.MeshConfig()
    cfg.dtype = "float32"
    cfg.prompts, cfg.sheet_num_steps = ("a red apple",), 2
    cfg.tensorboard, cfg.wandb = False, ""
    return cfg
