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
        (
            ("--config=configs/emoji.py", "--config.data.sources[9].weight=1"),
            r"expected elements that the config has; got --config.data.sources\[9\].weight=1",
        ),
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


FILES = {
    "empty.py": (b"", "get_config"),
    "only spaces.py": (b" \n\n", "get_config"),
    "binary.py": (bytes(range(256)), ""),
    "latin.py": (b"x = 'caf\xe9'\n", "utf-8"),
    "data.py": (b'{"optim": {"lr": 1e-4}}', "get_config"),
    "data.json": (b'{"optim": {"lr": 1e-4}}', "get_config"),
    "syntax.py": (b"def get_config(:\n", "invalid syntax"),
    "none.py": (b"def get_config(arg=None):\n    pass\n", "None"),
    "dict.py": (b"def get_config(arg=None):\n    return {}\n", "dict"),
    "variable.py": (b"get_config = 3\n", "not callable"),
    "no_argument.py": (b"def get_config():\n    return 1 / 0\n", "line 2.*division"),
    "import.py": (b"import no_such_module\n", "line 1.*no_such_module"),
    "exits.py": (b"import sys\nsys.exit(3)\n", "line 2.*SystemExit: 3"),
    "open.py": (b"def get_config(arg=None):\n    open('/no/such')\n", "/no/such"),
}


@pytest.mark.parametrize("separator", ["=", " "])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config_is_one_message(tmp_path, name, separator):
    content, pattern = FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    args = [f"--config={file}"] if separator == "=" else ["--config", str(file)]
    text = message(*args)
    assert str(file) in text
    assert re.search(pattern, text)
    with pytest.raises(ConfigError) as error:  # as evaluate reads it
        flag_parser.read_config(str(file))
    assert str(error.value).replace("\n", " ") == text


@pytest.mark.parametrize("command", ["-m janusflow_jax.train", "tools/plan.py"])
@pytest.mark.slow
def test_help_is_no_error(command):
    done = subprocess.run(
        [sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--config" in done.stdout, done.stderr


def test_the_command_prints_it_and_begins_nothing(tmp_path):
    command = [sys.executable, "-m", "janusflow_jax.train", f"--config.workdir={tmp_path}/run"]
    command += ["--config=configs/emoji.py", "--config.optm.lr=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert re.fullmatch("error: .*did you mean 'optim'.*", done.stderr.strip())
