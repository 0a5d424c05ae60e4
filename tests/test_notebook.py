"""The notebooks are stored without outputs, and run from their first cell to their last."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = ROOT / "notebooks" / "inference.ipynb"
SERVE = ROOT / "notebooks" / "serve.ipynb"


def cells_of(file: pathlib.Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["cells"]


def code_of(file: pathlib.Path) -> list[str]:
    return ["".join(c["source"]) for c in cells_of(file) if c["cell_type"] == "code"]


CELLS, CODE = cells_of(FILE), code_of(FILE)


@pytest.mark.parametrize("file", [FILE, SERVE])
def test_outputs_are_stripped_and_cells_are_python(file):
    for cell in cells_of(file):
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for source in code_of(file):
        compile(source, str(file), "exec")  # no magics: the next tests run it as it stands


def test_its_commands_are_the_projects():
    text = "".join("".join(c["source"]) for c in CELLS)
    assert "tools/convert_checkpoint.py --janusflow" in text and "--vae" in text
    for word in ("T4", "overflows", "bfloat16"):
        assert word in text


@pytest.mark.slow
@pytest.mark.parametrize("place", ["notebooks", "elsewhere"])
def test_every_cell_runs(place, tmp_path):
    """As a script, in order; the training cell with two steps.

    From the notebook's own folder, or as on Kaggle: from a folder elsewhere, the project read-only.
    """
    script, folder, code = tmp_path / "cells.py", FILE.parent, CODE
    env = {n: x for n, x in os.environ.items() if n not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= {"JANUSFLOW_MODEL": str(tmp_path / "run"), "JANUSFLOW_STEPS": "2"}
    run = tmp_path / "run"
    if place == "elsewhere":
        folder = tmp_path / "working"
        folder.mkdir()
        (folder / "project").symlink_to(ROOT)
        code = ["import os\nos.access = lambda *_: False", *CODE]
        del env["JANUSFLOW_MODEL"]
        run = folder / "runs" / "notebook"
    script.write_text("\n".join(code), encoding="utf-8")
    before = project_files()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 x cpu (cpu): float32, because there is no accelerator" in done.stdout
    assert "latents (3, 16, 16, 4)" in done.stdout
    assert (run / "checkpoints" / "2").exists()
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert said.count("red") == said.count("blue") == said.count("green") == 1, said
    if place == "elsewhere":
        assert (folder / "data" / "openmoji").is_dir() and project_files() == before


@pytest.mark.slow
def test_every_cell_of_the_server_runs(golden_folder, tmp_path):
    """As a script, in order, on a model folder."""
    pytest.importorskip("openai")
    script = tmp_path / "cells.py"
    script.write_text("\n".join(code_of(SERVE)), encoding="utf-8")
    env = {n: x for n, x in os.environ.items() if n not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=SERVE.parent,
        env=env | {"JANUSFLOW_MODEL": str(golden_folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seeds [0, 1, 2, 3]" in done.stdout
    assert done.stdout.count("image_generation.partial_image") == 3
    assert '"prompt": "a blue whale"' in done.stdout
    assert "answer: " in done.stdout and "exit status 0" in done.stdout


def project_files() -> set[str]:
    """What is in the project's folder, apart from caches."""
    names = (str(p.relative_to(ROOT)) for d in ("", "runs", "data") for p in (ROOT / d).glob("*"))
    return {n for n in names if not n.startswith(".")}
