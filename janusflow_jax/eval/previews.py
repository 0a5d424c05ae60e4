"""Previews of a run: a sheet of images for fixed prompts, and captions of held-out images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from PIL import Image, ImageOps

from janusflow_jax import pipeline
from janusflow_jax.config import MeshConfig, SourceConfig, TrainConfig
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format, images, samples, sources
from janusflow_jax.eval import sheet
from janusflow_jax.parallel import processes, sharding, trees
from janusflow_jax.training import metrics, step as train_step

MAX_CAPTION_TOKENS = 32


def caption_source(
    model: pipeline.Pipeline, source: SourceConfig, count: int
) -> list[dict[str, Any]]:
    """Captions of `count` images spread evenly over a source: each record's fields and `answer`."""
    records = sources.open_source(source.path, source.split)
    data = sources.mapped(records, source.fields, source.task)
    count = min(count, len(data))
    records = [data[i * len(data) // count] for i in range(count)]
    out = []
    for at in range(0, count, pipeline.MAX_BATCH):
        part = records[at : at + pipeline.MAX_BATCH]
        answers = model.chat(
            [samples.QUESTION] * len(part),
            images=[[r["image"]] for r in part],
            max_new_tokens=MAX_CAPTION_TOKENS,
        )
        for record, answer in zip(part, answers, strict=True):
            fields = ("id", "captions", "class", "colour", "image")
            out.append({k: record[k] for k in fields if k in record} | {"answer": answer})
    return out


def write(
    cfg: TrainConfig,
    workdir: epath.Path,
    step: int,
    state: train_step.State,
    chat: chat_format.ChatFormat,
    writer: metrics.Writer,
) -> None:
    """Writes `samples/sheet_<step>.png`, and `samples/captions_<step>.jsonl` and `.png` (images
    with the answer and the true caption).

    The model is that of the train state, with its EMA where there is one. All processes of a job
    call this and get a whole copy, one array at a time. The first one generates, on its first
    device; the others wait.
    """
    if not (cfg.prompts or cfg.heldout):
        return
    params = trees.merge(trees.merge(state["frozen"], state["params"]), state["ema"])
    params, vae = processes.whole((params, state["vae"]))
    try:
        if processes.is_main():
            _write_all(cfg, workdir, step, params, vae, chat, writer)
    finally:
        processes.barrier("previews")


def _write_all(
    cfg: TrainConfig,
    workdir: epath.Path,
    step: int,
    params: Any,
    vae: Any,
    chat: chat_format.ChatFormat,
    writer: metrics.Writer,
) -> None:
    model = pipeline.Pipeline(cfg.model, params, vae, chat, dtype=cfg.dtype)
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    one = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(one) if processes.count() > 1 else contextlib.nullcontext():
        if cfg.prompts and cfg.data.gen_slots:
            with _reported(step, "no sheet"):
                _write_sheet(cfg, folder, step, model, writer)
        if cfg.heldout:
            with _reported(step, "no captions"):
                _write_captions(cfg, folder, step, model, writer)


@contextlib.contextmanager
def _reported(step: int, what: str) -> Iterator[None]:
    """Prints what is wrong with a preview: only the losses may end a run, or a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001
        text = str(error) if isinstance(error, JanusFlowError) else repr(error)
        print(f"step {step}: {what}: {text}", flush=True)


def _write_sheet(
    cfg: TrainConfig,
    folder: epath.Path,
    step: int,
    model: pipeline.Pipeline,
    writer: metrics.Writer,
) -> None:
    solver: dict[str, Any] = {}
    if not cfg.model.student.steps:
        solver = {"guidance_scale": cfg.sheet_cfg_weight, "num_steps": cfg.sheet_num_steps}
    generated = model.generate(list(cfg.prompts), **solver)
    path = folder / f"sheet_{step:06d}.png"
    grid = sheet.image_grid(generated, list(cfg.prompts))
    sheet.save(grid, path)
    print(f"step {step}: images for {len(cfg.prompts)} prompts in {path}", flush=True)
    writer.image(step, "sheet", grid)


def _write_captions(
    cfg: TrainConfig,
    folder: epath.Path,
    step: int,
    model: pipeline.Pipeline,
    writer: metrics.Writer,
) -> None:
    lines, shown, labels = [], [], []
    side = (cfg.model.image_size,) * 2
    for source in cfg.heldout:
        for record in caption_source(model, source, cfg.heldout_captions):
            image = Image.fromarray(images.decode(record.pop("image")))
            shown.append(ImageOps.pad(image, side, color="white"))
            labels.append(f"{record['answer']} [{record['captions'][0]}]")
            lines.append({"split": source.split, **record})
    if not lines:
        return
    grid = sheet.image_grid(shown, labels)
    sheet.save(grid, folder / f"captions_{step:06d}.png")
    writer.image(step, "captions", grid)
    num_exact = sum(line["answer"] in line["captions"] for line in lines)
    path = folder / f"captions_{step:06d}.jsonl"
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    print(f"step {step}: {num_exact} of {len(lines)} held-out captions exact, {path}", flush=True)
