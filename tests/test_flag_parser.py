"""What `--config` and its flags cannot take is one message, as a user sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from janusflow_jax.config import ConfigError, flags as flag_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_config_file_is_loaded():
    """ml_collections loads every file as one module, in which the names of the last one remain."""
    yield
    sys.modules.pop("config_config", None)


def message(*args: str) -> str:
    argv, values = ["train", *args], flags.FlagValues()
    with pytest.raises(ConfigError) as error:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        flag_parser.parse(argv, values)
    return str(error.value).replace("\n", " ")


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (("--config=nope.py",), "--config: expected a file.*'nope.py'"),
        (("--config=configs/finetune.py:pant",), r"config argument: unknown \['pant'\]; kno"),
        (
            ("--config=configs/finetune.py:lora",),
            "configs/finetune.py: expected generate, understand",
        ),
        (("--config=configs/emoji.py", "--config.optm.lr=1"), "did you mean 'optim'"),
        (("--config=configs/emoji.py", "--config.optim.lr=x"), "optim.lr=x: could not convert str"),
        (("--config=configs/emoji.py", "--confg=1"), "Unknown command line flag 'confg'.*config"),
    ],
)
def test_one_message_for_what_cannot_be_taken(monkeypatch, args, pattern):
    monkeypatch.chdir(ROOT)
    assert re.search(pattern, message(*args))


def test_a_config_file_with_a_mistake_shows_where(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config(arg=None):\n    return 1 + 'a'\n")
    assert re.search("mine.py.*line 2.*unsupported operand", message(f"--config={file}"))


def test_the_command_prints_it_and_begins_nothing(tmp_path):
    command = [sys.executable, "-m", "janusflow_jax.train", f"--config.workdir={tmp_path}/run"]
    command += ["--config=configs/emoji.py", "--config.optm.lr=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert re.fullmatch("error: .*did you mean 'optim'.*", done.stderr.strip())
