"""Made this folder with the code of commit 0f65f22. Kept as a record; do not run it again.

It holds what users have on disk: a prepared data set, a model folder, a LoRA run, an exported
adapter, latent caches, and a config file of their own. `expected.json` has the numbers that the
code of that commit computes from them. Later code must read all of it and give the same numbers
(tests/test_compatibility.py). Run from the repository root, so that no stored path is absolute:

    PYTHONPATH=. python tests/data/compat/make_compat.py
"""

import contextlib
import dataclasses
import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, "tests")
import conftest  # noqa: E402, F401 - 8 fake devices and full precision, as in the tests
import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

import janusflow_jax  # noqa: E402
from janusflow_jax.train import train  # noqa: E402

HERE = Path("tests/data/compat")
HUB = "tests/data/golden/tiny/janusflow"
COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 180, 40)}
CONFIG = runpy.run_path(str(HERE / "user_config.py"))["get_config"]
LOSSES = ("loss", "loss_ar", "loss_rf", "grad_norm")
PROMPT = "a red disc"
QUESTION = "What is in the image?"


def tool(name: str, *args: object) -> None:
    """Runs a script of tools/ as its command line does."""
    argv = sys.argv
    sys.argv = [f"tools/{name}.py", *map(str, args)]
    try:
        with contextlib.suppress(SystemExit):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv


def draw(folder: Path) -> None:
    """24 small drawings, each with its caption in a text file beside it."""
    folder.mkdir()
    for i in range(24):
        color, shape = list(COLORS)[i % 3], ("disc", "square")[i % 2]
        image = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "disc" else pen.rectangle)(
            (8 + i % 5, 12, 40 + i % 8, 48), fill=COLORS[color]
        )
        image.save(folder / f"{i:02}.png", optimize=True)
        (folder / f"{i:02}.txt").write_text(f"a {color} {shape}\n")


def losses(workdir: Path, names: tuple[str, ...] = LOSSES) -> dict[str, dict[str, float]]:
    """Step -> the losses, held-out losses and gradient norms that a run has logged."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        held = {n for n in line if n.startswith("eval") and n.endswith(("loss_ar", "loss_rf"))}
        picked = {n: x for n, x in line.items() if n in names or n in held}
        found.setdefault(str(line["step"]), {}).update(picked)
    return found


def summary(latents: np.ndarray) -> dict[str, object]:
    """Shape, mean, standard deviation and a few values."""
    return {
        "shape": list(latents.shape),
        "mean": float(latents.mean()),
        "std": float(latents.std()),
        "values": [float(x) for x in latents.ravel()[::29][:8]],
    }


def main() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="compat-"))
    draw(HERE / "images")
    prepare = ("folder", HERE / "images", "--out", HERE / "data", "--tokenizer", HUB)
    tool("prepare_data", *prepare, "--heldout", 0.25, "--workers", 1)

    # A model trained for a few steps, exported to the published layout and converted back.
    cfg = CONFIG()
    cfg.start, cfg.tokenizer, cfg.allow_fresh = "", HUB, True
    cfg.workdir, cfg.num_steps, cfg.save_every_steps = str(scratch / "first"), 20, 0
    cfg.train_parts = tuple(dict.fromkeys((*cfg.train_parts, "llm")))
    cfg.train_parts = tuple(p for p in cfg.train_parts if not p.startswith("repa"))
    train(cfg)
    tool("export_checkpoint", "--model", cfg.workdir, "--dtype", "float32", "--out", scratch / "hf")
    tool("convert_checkpoint", "--janusflow", scratch / "hf", "--out", HERE / "model")

    cfg = CONFIG("lora")
    cfg.workdir = str(HERE / "run")
    train(cfg)
    (HERE / "run" / "lock").unlink()
    tool("export_checkpoint", "--model", HERE / "run", "--adapter-only", "--out", HERE / "adapter")
    both = ("--data", HERE / "data", "--model", HERE / "model", "--dtype", "float32")
    out = HERE / "cache_generate"
    tool("cache_latents", *both, "--out", out, "--crops", 2, "--features")
    tool("cache_latents", *both, "--out", HERE / "cache_understand", "--task", "understand")

    shutil.copytree(HERE / "run", scratch / "run")
    cfg = CONFIG("lora")
    cfg.workdir, cfg.num_steps = str(scratch / "run"), 4
    train(cfg)
    cfg = CONFIG("cached")
    cfg.workdir = str(scratch / "cached")
    train(cfg)
    args = {"seed": 0, "num_steps": 3, "output": "latent"}
    image = str(HERE / "images" / "00.png")
    plain = janusflow_jax.load(HERE / "model", dtype="float32")
    adapted = janusflow_jax.load(HERE / "model", dtype="float32", adapter=HERE / "adapter")
    expected = {
        "config": {
            name: json.loads(json.dumps(dataclasses.asdict(CONFIG(name))))
            for name in ("lora", "cached", "256")
        },
        "losses": {
            "run": losses(scratch / "run"),
            "cached": losses(scratch / "cached", (*LOSSES, "loss_repa")),
        },
        "model": {
            "latents": summary(plain.generate(PROMPT, **args)),
            "answer": plain.chat(QUESTION, [image], max_new_tokens=8),
            "encoded": summary(plain.encode_image(image)),
        },
        "adapter": {
            "latents": summary(adapted.generate(PROMPT, **args)),
            "answer": adapted.chat(QUESTION, [image], max_new_tokens=8),
        },
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
