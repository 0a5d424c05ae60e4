"""Processes of a benchmark that die at any moment: the images are the same in the end."""

import hashlib
import json
import os
import pathlib
import random
import sys
import time

import pytest
from helpers import jobs

COLORS = ("red", "blue", "green", "pink", "gray", "white", "black", "brown")
PROMPTS = [f"a photo of a {color} fox" for color in COLORS]
PROMPTS += [f"{p} on a hill beside tall old trees under a wide and cloudy sky" for p in PROMPTS]
BATCHES = 32


def write_data(folder):
    """Prompts of two lengths, in the form of GenEval."""
    lines = [
        {"tag": "colors", "include": [{"class": "fox", "count": 1}], "prompt": p} for p in PROMPTS
    ]
    file = folder / "metadata.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return file


def start(model, data, out, process, processes):
    options = f"--model {model} --data {data} --out {out} --shard {process}/{processes}"
    fixed = "--stage run --steps 8 --batch 2 --guidance-scale 3 --seed 7"
    args = [sys.executable, "-m", "janusflow_jax.benchmark", "geneval"]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    return jobs.Process([*args, *options.split(), *fixed.split()], env)


def batches_done(process):
    """Batches that a process has generated; -1 before it begins."""
    return process.output().count(" images, ") - 1


def checksums(out):
    """SHA-256 of every file of a run."""
    files = sorted(x for x in pathlib.Path(out).rglob("*") if x.is_file())
    return {str(x.relative_to(out)): hashlib.sha256(x.read_bytes()).hexdigest() for x in files}


def complete(model, data, out, processes):
    for process in [start(model, data, out, n, processes) for n in range(processes)]:
        assert process.wait(jobs.TIMEOUT_S) == 0, process.output()


def killed(model, data, out, processes, kills, seed=0):
    """Kills all processes at a random moment, `kills` times, then runs them to the end.

    Returns: marks that were there after each kill.
    """
    generator, marks = random.Random(seed), []
    for _ in range(kills):
        running = [start(model, data, out, n, processes) for n in range(processes)]
        chosen, batches = generator.choice(running), generator.randrange(2)
        while chosen.poll() is None and batches_done(chosen) < batches:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        for p in running:
            p.kill()
            p.wait()
        marks.append(len(list(pathlib.Path(out).glob("manifest/0*.json"))))
    complete(model, data, out, processes)
    return marks


@pytest.mark.slow
def test_killed_processes_lose_nothing(golden_folder, tmp_path):
    data = write_data(tmp_path)
    complete(golden_folder, data, tmp_path / "whole", 1)
    whole = checksums(tmp_path / "whole")
    assert sum(name.endswith(".png") for name in whole) == 4 * len(PROMPTS)
    marks = killed(golden_folder, data, tmp_path / "killed", processes=2, kills=2)
    assert checksums(tmp_path / "killed") == whole
    assert 0 < marks[-1] < BATCHES
