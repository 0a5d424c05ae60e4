"""What `--config` and its flags cannot take is one message, as a user sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def said(tmp_path: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "janusflow_jax.train", *args, f"--config.workdir={tmp_path}/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--config=nope.py",), "error: --config: expected a file.*'nope.py'"),
        (
            ("--config=configs/finetune.py:pant",),
            r"error: config argument: unknown \['pant'\]; kno",
        ),
        (
            ("--config=configs/finetune.py:lora",),
            "error: configs/finetune.py: expected paint, read",
        ),
        (("--config=configs/emoji.py", "--config.optm.lr=1"), "did you mean 'optim'"),
        (("--config=configs/emoji.py", "--config.optim.lr=x"), "optim.lr=x: could not convert str"),
        (("--config=configs/emoji.py", "--confg=1"), "Unknown command line flag 'confg'.*config"),
    ],
)
def test_one_message_for_what_cannot_be_taken(tmp_path, args, message):
    assert re.search(message, said(tmp_path, *args).replace("\n", " "))


def test_a_config_file_with_a_mistake_shows_where(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config(arg=None):\n    return 1 + 'a'\n")
    done = subprocess.run(
        [sys.executable, "-m", "janusflow_jax.train", f"--config={file}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "mine.py" in done.stderr and "line 2" in done.stderr
    assert "unsupported operand" in done.stderr
