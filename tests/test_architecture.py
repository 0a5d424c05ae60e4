"""Holds the import rules of docs/architecture.md: packages import downward only, and some libraries
stay in one place."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "janusflow_jax"

MAY_IMPORT = {
    "config": "",
    "memory": "",
    "parallel": "config memory",
    "data": "config",
    "models": "config parallel",
    "sampling": "config parallel data models",
    "checkpoints": "config parallel models",
    "training": "config parallel data models sampling checkpoints",
    "hub": "config parallel data models checkpoints",
    "pipeline": "config parallel data models sampling checkpoints hub",
    "planning": "config parallel data models sampling checkpoints training pipeline",
    "eval": "config parallel data models sampling checkpoints training hub pipeline",
    "openmoji": "config parallel data models sampling checkpoints training hub pipeline eval",
    "harness": "config parallel data models sampling checkpoints hub pipeline eval",
    "cli": "config parallel checkpoints pipeline",
    "serve": "config parallel data models sampling checkpoints hub pipeline eval cli",
}
"""Package (or module of the root) -> what it may import beside itself. Entry points: anything."""

ENTRY_POINTS = {"train", "edit", "generate", "chat", "evaluate", "benchmark"}

ONLY = {
    "orbax": ("checkpoints.",),
    "grain": ("data.loader",),
    "transformers": (),
    "tokenizers": ("data.chat_format", "eval.clip"),
    "array_record": ("data.", "openmoji."),
    "tensorflow_datasets": ("data.", "openmoji."),
    "pyarrow": ("data.prepare.parquet",),
    "apache_beam": ("data.prepare.engines",),
    "ray": ("data.prepare.engines",),
    "safetensors": ("hub.", "openmoji.judge"),
    "huggingface_hub": ("hub.",),
    "jax": ("", "-config.", "-data."),
    "flax": ("", "-config.", "-data."),
    "optax": ("", "-config.", "-data."),
    "torch": (),
    "tensorflow": (),
    "diffusers": (),
    "lmms_eval": ("harness.lmms",),
    "vlmeval": ("harness.vlmeval",),
    "starlette": ("serve.",),
    "uvicorn": ("serve.listen", "serve.guard"),
    "prometheus_client": ("serve.metrics",),
}
"""Library -> prefixes of the modules that may import it; a minus sign excludes a prefix."""


def modules() -> dict[str, pathlib.Path]:
    """'data.rows' -> its file, of every module of the package."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", f"{PACKAGE}/*.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = sorted({ROOT / line for line in out.splitlines()})
    return {
        ".".join(p.relative_to(ROOT / PACKAGE).with_suffix("").parts): p
        for p in paths
        if p.exists()
    }


def imports(source: str, for_types: bool = True) -> set[str]:
    """Full names of everything that a source imports, inside functions too.

    Args: for_types: also under `if TYPE_CHECKING`, which nothing runs.
    """
    tree, names = ast.parse(source), set()
    if not for_types:
        tree.body = [x for x in tree.body if not _is_for_types(x)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def allows(prefixes: tuple[str, ...], module: str) -> bool:
    if any(module.startswith(p[1:]) for p in prefixes if p.startswith("-")):
        return False
    return any(module.startswith(p) for p in prefixes if not p.startswith("-"))


def problems(module: str, source: str) -> list[str]:
    """Every import of a module that the rules forbid."""
    package, out = module.split(".")[0], []
    for name in sorted(imports(source)):
        library, *rest = name.split(".")
        if library == PACKAGE and rest:
            if package in ENTRY_POINTS or package == "__init__" or rest[0] == package:
                continue
            if rest[0] not in MAY_IMPORT[package].split():
                out.append(f"{module} imports {name}: {package} may not import {rest[0]}")
        elif not allows(ONLY.get(library, ("",)), module):
            out.append(f"{module} imports {library}: allowed in {list(ONLY[library])}")
        elif package == "config" and module not in ("config.flags", "config.files"):
            if library not in sys.stdlib_module_names and library != PACKAGE:
                out.append(f"{module} imports {library}: standard library only")
    return out


def test_the_root_holds_packages_and_entry_points_only():
    root = {name.split(".")[0] for name in modules()}
    assert root == {*MAY_IMPORT, *ENTRY_POINTS, "__init__"}


def test_imports_point_down():
    wrong = [p for name, path in modules().items() for p in problems(name, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_rules_have_no_cycle():
    placed: set[str] = set()
    while rest := {p for p in MAY_IMPORT if p not in placed}:
        free = {p for p in rest if {*MAY_IMPORT[p].split()} <= placed}
        assert free, f"these packages import each other: {sorted(rest)}"
        placed |= free


def test_modules_import_no_cycle():
    """Inside packages too."""
    paths = modules()
    edges = {}
    for name, path in paths.items():
        targets = set()
        for full in imports(path.read_text(), for_types=False):
            parts = full.split(".")[1:] if full.startswith(PACKAGE + ".") else []
            ends = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            targets |= {e for e in ends if e in paths and e != name}
        edges[name] = targets
    placed: set[str] = set()
    while rest := {m for m in edges if m not in placed}:
        free = {m for m in rest if edges[m] <= placed}
        assert free, f"these modules import each other: {sorted(rest)}"
        placed |= free


def test_config_files_import_config_only():
    for path in (ROOT / "configs").glob("*.py"):
        ours = {n for n in imports(path.read_text()) if n.startswith(PACKAGE)}
        wrong = {n for n in ours if n.split(".")[1] != "config"}
        assert not wrong, f"{path.name} imports {sorted(wrong)}: expected {PACKAGE}.config only"


def test_no_test_file_imports_another():
    """What they share is in tests/helpers."""
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "helpers").glob("*.py")]:
        roots = {name.split(".")[0] for name in imports(path.read_text())}
        wrong = {n for n in roots if n.startswith("test_") or n in ("conftest", "tests")}
        assert not wrong, f"{path.name} imports {sorted(wrong)}: expected tests/helpers only"


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("models.llama", "from janusflow_jax.sampling import flow", "may not import sampling"),
        ("training.step", "def f():\n    from orbax.checkpoint import v1", "imports orbax"),
        ("data.rows", "import jax.numpy as jnp", "imports jax"),
        ("config.run", "import numpy", "standard library only"),
        ("hub.tensors", "import torch.nn", "imports torch"),
    ],
)
def test_the_rules_can_fail(module, source, message):
    (problem,) = problems(module, source)
    assert message in problem


def test_the_public_names_need_no_further_import():
    """`jf.config`, `jf.hub` and `jf.load` work after one import, which is fast."""
    code = (
        "import sys, janusflow_jax as jf; "
        "jf.config.model_config('1p3b'), jf.load, jf.hub; "
        "heavy = {'jax', 'numpy', 'flax', 'orbax', 'huggingface_hub'} & {*sys.modules}; "
        "assert not heavy, heavy; "
        "jf.hub.convert, jf.hub.assemble, jf.hub.export, jf.hub.save_adapter"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
