"""What a run shows of itself: a sheet of pictures for fixed prompts, captions of held-out ones."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath
from PIL import Image, ImageOps

from janusflow_jax import pipeline
from janusflow_jax.config import MeshConfig, SourceConfig, TrainConfig
from janusflow_jax.data import images, samples, sources
from janusflow_jax.eval import sheet
from janusflow_jax.parallel import processes, sharding, trees

MAX_CAPTION_TOKENS = 32


def from_state(cfg: TrainConfig, state: Any, chat: Any) -> pipeline.Pipeline:
    """The model that a train state holds (its EMA where there is one), ready to run.

    All processes of a job call it: each gets a whole copy, array after array.
    """
    params = trees.merge(trees.merge(state["frozen"], state["params"]), state["ema"])
    params, vae = processes.whole((params, state["vae"]))
    return pipeline.Pipeline(cfg.model, params, vae, chat, dtype=cfg.dtype)


def caption_source(
    model: pipeline.Pipeline, source: SourceConfig, count: int
) -> list[dict[str, Any]]:
    """Captions `count` pictures spread evenly over a source; with the truth beside them."""
    opened = sources.open_source(source.path, source.split)
    data = sources.mapped(opened, source.fields, source.task)
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
            keep = {k: record[k] for k in ("id", "captions", "class", "colour") if k in record}
            out.append({**keep, "answer": answer, "image": record["image"]})
    return out


def write(
    cfg: TrainConfig, workdir: epath.Path, step: int, state: Any, chat: Any, writer: Any
) -> None:
    """Writes `samples/sheet_<step>.png` and `samples/captions_<step>.jsonl` and `.png` (pictures
    with answer and truth) into the workdir.

    With several processes the first one does it, on its first device, while the others wait.
    """
    if not (cfg.prompts or cfg.heldout):
        return
    model = from_state(cfg, state, chat)
    if processes.count() == 1:
        _write(cfg, workdir, step, model, writer)
    elif processes.is_main():
        one = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
        with jax.set_mesh(one):
            _write(cfg, workdir, step, model, writer)


def _write(
    cfg: TrainConfig,
    workdir: epath.Path,
    step: int,
    model: pipeline.Pipeline,
    writer: Any,
) -> None:
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.prompts and cfg.data.gen_slots:
        pictures = model.generate(
            list(cfg.prompts), guidance_scale=cfg.sheet_cfg_weight, num_steps=cfg.sheet_num_steps
        )
        path = folder / f"sheet_{step:06d}.png"
        grid = sheet.make_sheet(pictures, list(cfg.prompts))
        _save_png(grid, path)
        print(f"step {step}: pictures for {len(cfg.prompts)} prompts in {path}", flush=True)
        writer.image(step, "sheet", grid)
    lines, shown, said = [], [], []
    side = (cfg.model.image_size,) * 2
    for source in cfg.heldout:
        for record in caption_source(model, source, cfg.heldout_captions):
            picture = Image.fromarray(images.decode(record.pop("image")))
            shown.append(ImageOps.pad(picture, side, color="white"))
            said.append(f"{record['answer']} [{record['captions'][0]}]")
            lines.append({"split": source.split, **record})
    if lines:
        grid = sheet.make_sheet(shown, said)
        _save_png(grid, folder / f"captions_{step:06d}.png")
        writer.image(step, "captions", grid)
        right = sum(line["answer"] in line["captions"] for line in lines)
        path = folder / f"captions_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
        print(f"step {step}: {right} of {len(lines)} held-out captions exact, {path}", flush=True)


def _save_png(image: Image.Image, path: epath.Path) -> None:
    with path.open("wb") as f:
        image.save(f, "PNG")
