"""Published checkpoints in and out: convert, assemble, export, and adapters in PEFT's layout.

The functions load their modules when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from janusflow_jax.hub.adapters import save_adapter
    from janusflow_jax.hub.assemble_parts import assemble
    from janusflow_jax.hub.export_janusflow import export
    from janusflow_jax.hub.import_janusflow import convert

__all__ = ["assemble", "convert", "export", "save_adapter"]

_MODULES = {
    "assemble": "assemble_parts",
    "convert": "import_janusflow",
    "export": "export_janusflow",
    "save_adapter": "adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
