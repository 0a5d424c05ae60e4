"""Holds the layers: who may import whom, and who may know which library.

The table is the design. A file may import files of lower layers, and those left of it on its own.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "janusflow_jax"
MAX_LINES = 400

LAYERS = (
    # 0 GROUND
    (
        "config_model",
        "config",
        "config_checks",
        "config_stages",
        "compile_cache",
        "distributed",
        "sharding",
        "trees",
        "models.splash",
        "models.blocks",
        "models.quantize",
        "models.layers",
    ),
    # 1 PARTS
    ("flow", "models.lora", "models.llama", "models.siglip", "models.convnext", "models.vae"),
    # 2 MODEL, and the data in numpy: no jax
    (
        "models.janusflow",
        "data.openmoji_sheet", "data.openmoji_classes", "data.images", "data.chat_format",
        "data.train_tokenizer", "data.sources", "data.samples", "data.lengths", "data.pieces",
        "data.packing", "data.latent_cache", "data.slots", "data.rows",
        "data.openmoji", "data.openmoji_build", "data.requests",
        "data.importers.raw", "data.importers.inputs", "data.importers.fields",
        "data.importers.lines", "data.importers.texts", "data.importers.pictures",
        "data.importers.transform", "data.importers.folder", "data.importers.webdataset",
        "data.importers.parquet", "data.importers.llava", "data.importers.text",
        "data.engines", "data.prepare_files", "data.prepare_report", "data.prepare",
        "data.preview",
    ),
    # 3 PROBLEM
    ("cross_entropy", "losses", "flops", "optim", "decode", "sampler", "data.loader"),
    # 4 MACHINERY
    (
        "train_step", "checksums", "checkpoint", "run_checkpoints", "run_state",
        "workdir", "preempt",
        "safetensor_files", "torch_names", "convert",
        "hub_config", "hub_source", "hub_import", "hub_assemble", "hub_export",
        "metrics", "goodput",
        "peft_config", "adapters", "identity",
        "eval.stats", "eval.sheet", "eval.partial", "eval.emoji", "eval.frechet", "eval.judge",
        "eval.judged", "pipeline", "eval.ready", "samples", "starts",
        "guard", "heldout_guard", "heldout", "heldout_model", "latents",
        "plan_topology", "plan_compile", "plan_flops", "plan_collectives", "plan_report",
        "plan_text", "plan_sampler",
    ),
    # 5 ENTRY
    ("command_line", "flag_parser", "train", "generate", "chat", "evaluate"),
)  # fmt: skip
"""Modules of the package by layer, from the left."""

ONLY = {
    "orbax": ("checkpoint", "run_checkpoints"),
    "transformers": ("data.chat_format",),
    "tokenizers": ("data.chat_format", "data.train_tokenizer"),
    "grain": ("data.",),
    "array_record": ("data.",),
    "tensorflow_datasets": ("data.",),
    "pyarrow": ("data.importers.parquet",),
    "apache_beam": ("data.engines",),
    "ray": ("data.engines",),
    "safetensors": (),
    "torch": (),
    "tensorflow": (),
    "diffusers": (),
    "clu": (),
}
"""Library -> the modules (or, with a dot at the end, packages) that may import it."""

NUMPY_ONLY = ("jax", "flax", "optax")
"""Libraries that data of layer 2 may not import."""


def tracked(*patterns: str) -> list[pathlib.Path]:
    """Files of the project, committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [p for p in sorted({ROOT / line for line in out.splitlines()}) if p.exists()]


def imports(source: str) -> set[str]:
    """Full names of everything that a source imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: pathlib.Path) -> str:
    """'data.rows' for janusflow_jax/data/rows.py."""
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


PLACE = {name: (i, j) for i, row in enumerate(LAYERS) for j, name in enumerate(row)}


def own(name: str) -> str | None:
    """The module of the table that an imported name means ('...data.rows.Row' -> 'data.rows')."""
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        return None
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in PLACE:
            return ".".join(parts[:end])
    return name


def problems(module: str, source: str) -> list[str]:
    """Everything that a module of the package imports and may not."""
    found = []
    layer, column = PLACE[module]
    for name in sorted(imports(source)):
        target = own(name)
        if target is not None:
            if target not in PLACE:
                found.append(f"{module} imports {name}: not in the table of tests/test_layers.py")
            elif PLACE[target] >= (layer, column):
                found.append(
                    f"{module} (layer {layer}) imports {target} (layer {PLACE[target][0]}): "
                    "expected a lower layer, or one to the left in the table"
                )
            continue
        library = name.split(".")[0]
        allowed = ONLY.get(library, ("",))
        if not any(module == a or (a[-1:] in ("", ".") and module.startswith(a)) for a in allowed):
            found.append(f"{module} imports {library}: only {list(allowed) or 'tests'} may")
        if layer == 2 and module.startswith("data.") and library in NUMPY_ONLY:
            found.append(f"{module} imports {library}: data of layer 2 is numpy only")
        if module == "config" and library not in sys.stdlib_module_names:
            found.append(f"config imports {library}: it is standard library only")
    return found


def test_every_file_has_its_layer():
    files = {module_name(p) for p in tracked(f"{PACKAGE}/*.py") if p.name != "__init__.py"}
    assert not files - set(PLACE), (
        f"{sorted(files - set(PLACE))}: new files; add each to LAYERS in tests/test_layers.py, "
        "in the lowest layer that its imports allow"
    )
    assert not set(PLACE) - files, f"{sorted(set(PLACE) - files)}: in LAYERS, but no such file"


@pytest.mark.parametrize("module", PLACE)
def test_imports_go_down_or_left(module):
    path = ROOT / PACKAGE / (module.replace(".", "/") + ".py")
    found = problems(module, path.read_text())
    assert not found, "\n".join(found)


def test_init_files_import_only_the_python_face():
    face = {"__future__.annotations", "typing.Any", f"{PACKAGE}.pipeline"}
    for path in tracked(f"{PACKAGE}/*__init__.py"):
        allowed = face if path.parent.name == PACKAGE else set()
        assert imports(path.read_text()) <= allowed, f"{path}: expected only {sorted(allowed)}"


def test_config_files_import_only_config():
    for path in tracked("configs/*.py"):
        allowed = {"dataclasses", "math", "typing.Any", "__future__.annotations"}
        others = imports(path.read_text()) - allowed
        wrong = {n for n in others if own(n) not in ("config", "config_stages")}
        expected = f"{PACKAGE}.config and config_stages"
        assert not wrong, f"{path}: expected only {expected}; it imports {sorted(wrong)}"


def test_tools_import_no_library_that_the_package_may_not():
    for path in tracked("tools/*.py"):
        libraries = {name.split(".")[0] for name in imports(path.read_text())}
        wrong = libraries & {"torch", "tensorflow", "diffusers", "clu", "orbax"}
        if path.name == "torch_reference.py":  # what our model is compared with, and nothing else
            wrong -= {"torch", "diffusers"}
            assert PACKAGE not in libraries, f"{path}: expected none of our own code in it"
        assert not wrong, f"{path}: imports {sorted(wrong)}"


def test_no_file_is_too_long():
    lines = {p: len(p.read_text().splitlines()) for p in tracked("*.py")}
    long = {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > MAX_LINES}
    assert not long, f"expected at most {MAX_LINES} lines a file; got {long}: split them by purpose"


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("flow", "from janusflow_jax.models import janusflow", "lower layer"),
        ("models.llama", "from janusflow_jax.models import siglip", "to the left"),
        ("flow", "from janusflow_jax import secret", "not in the table"),
        (
            "train_step",
            "def f():\n    from orbax.checkpoint import v1",
            "only \\['checkpoint', 'run",
        ),
        ("checkpoint", "import torch.nn", "only tests may"),
        ("losses", "import grain", "only \\['data.'\\]"),
        ("data.rows", "import jax.numpy as jnp", "numpy only"),
        ("config", "import numpy", "standard library only"),
    ],
)
def test_this_test_can_fail(module, source, says):
    (found,) = problems(module, source)
    assert re.search(says, found)


def test_what_is_allowed_is_allowed():
    assert not problems("data.loader", "import grain\nfrom janusflow_jax.data import rows as r")
    assert not problems("models.siglip", "from janusflow_jax.models.layers import gelu\nimport jax")
