"""What the README promises: its test command is CI's, and its commands name files that exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def bash_blocks() -> list[str]:
    fenced = re.split(r"^```", README, flags=re.MULTILINE)[1::2]
    return [body for head, _, body in (block.partition("\n") for block in fenced) if head == "bash"]


def test_ci_runs_the_test_command():
    command = next(b for b in bash_blocks() if ".[test]" in b).strip()
    assert command.split(" && ")[-1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_commands_name_files_that_exist():
    text = "\n".join(bash_blocks())
    files = re.findall(r"(?:configs|tools)/\w+\.py", text)
    for module in re.findall(r"-m (janusflow_jax[\w.]*)", text):
        path = module.replace(".", "/")
        files.append(f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py")
    assert files and not [f for f in files if not (ROOT / f).exists()]
