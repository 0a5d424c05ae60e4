"""The README says what is there: the tree, the commands, the test command that CI runs."""

import pathlib
import re
import subprocess

import test_layers

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language):
    fenced = re.split(r"^```", README, flags=re.MULTILINE)[1::2]
    parts = (block.partition("\n") for block in fenced)
    return [body for head, _, body in parts if head == language]


def _tree():
    """Paths of the README's tree, by indentation."""
    (block,) = (b for b in _blocks("") if "janusflow_jax/\n" in b)
    paths, folders = set(), []
    for line in block.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        paths.add("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return paths


def test_the_tree_names_every_file():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {f for f in out.splitlines() if (ROOT / f).exists()}
    files = {f for f in files if not re.search(r"__init__\.py$|^tests/test_", f)}
    tree = _tree()
    assert not files - tree, f"not in README's tree: {sorted(files - tree)}"
    gone = {p for p in tree if p.endswith(".py") and "*" not in p} - files
    assert not gone, f"in README's tree, but no such file: {sorted(gone)}"


def test_the_tree_gives_the_layers_that_hold():
    said = dict(re.findall(r"^ +(\w+)\.py +(\d) ", README, re.MULTILINE))
    for module, (layer, _) in test_layers.PLACE.items():
        stem = module.split(".")[-1]
        if module in ("samples", "data.samples"):
            continue  # one name, two layers
        assert said.get(stem) == str(layer), f"README's tree: {module} is of layer {layer}"


def test_ci_runs_the_test_command():
    command = next(b for b in _blocks("bash") if ".[test]" in b)
    run = (ROOT / ".ci" / "run").read_text()
    last = command.strip().split(" && ")[-1]
    assert last in run.splitlines()
    assert "-e '.[test]'" in command and "-e '.[test]'" in run


def test_commands_name_files_that_exist():
    text = "\n".join(_blocks("bash"))
    for path in re.findall(r"(?:configs|tools)/\w+\.py", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m (janusflow_jax[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
