"""A folder as people publish it: its JSON files, its tensors, its licence, and what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from janusflow_jax.checkpoints import checksums
from janusflow_jax.hub import safetensors as safetensors_io

DTYPES = {"": None, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
LICENCES_FILE, UNUSED_FILE = "licences.json", "unused.safetensors"
VAE_CONFIG_FILE, LLM_CONFIG_FILE = "vae_config.json", "llm_config.json"
_LICENCE_FILE = re.compile(r"(licen[cs]e|notice|copying|copyright)", re.IGNORECASE)
_KEPT_ENDINGS = (".json", ".model", ".txt", ".jinja")
_MAX_KEPT = 64 << 20

_KINDS = {
    "janusflow": "JanusFlow",
    "janus": "Janus or Janus-Pro, which paint with tokens of a codebook (gen_vision_config)",
    "vae": "a VAE (AutoencoderKL; --vae)",
    "llm": "a Llama (--llm)",
    "siglip": "a SigLIP (--siglip)",
}


class Source:
    """One published folder, opened: headers only. Problems gather; nothing is raised here."""

    def __init__(self, path: Any, role: str, names: Sequence[str] = safetensors_io.SINGLE):
        """Args: role: key of _KINDS; names: what the weights may be called."""
        self.folder, self.role = epath.Path(path), role
        opened = safetensors_io.open_folder(self.folder, names)
        self.tensors: dict[str, Any] = dict(opened.tensors)
        self.files, self.problems = opened.files, list(opened.problems)
        self.notes = [f"{self.folder / n}: not read" for n in opened.ignored if opened.files]
        # Whether names and shapes can be compared: nothing is missing for another reason.
        self.whole = all(p.startswith("duplicate") for p in self.problems)
        self.config: dict[str, Any] = {}
        if self.folder.is_dir():
            self.config = self.json("config.json", required=role != "siglip")
            self._check_kind()

    def json(self, name: str, required: bool = False) -> dict[str, Any]:
        """A JSON file's object; {} when it is not there or is damaged (noted as a problem)."""
        path = self.folder / name
        if not path.exists():
            if required:
                self.problems.append(f"{path}: missing")
            return {}
        try:
            value = json.loads(path.read_text())
            if not isinstance(value, dict):
                raise ValueError(f"expected an object; got {type(value).__name__}")
            return value
        except (OSError, ValueError) as error:
            self.problems.append(f"{path}: expected a JSON file; {error}")
            return {}

    def _check_kind(self) -> None:
        got = kind_of(self.config)
        if self.config and not self.right_kind:
            told = _KINDS.get(got, f"of model_type {got!r}")
            self.problems.append(
                f"{self.folder / 'config.json'}: expected {_KINDS[self.role]}; it is {told}"
            )

    @property
    def right_kind(self) -> bool:
        return kind_of(self.config) == self.role

    def drop(self, pattern: str, what: str) -> None:
        """Forgets tensors that are not for us, with a note."""
        gone = [n for n in self.tensors if re.match(pattern, n)]
        if gone:
            self.tensors = {n: x for n, x in self.tensors.items() if n not in set(gone)}
            self.notes.append(f"{self.folder}: {len(gone)} tensors not used ({what})")

    def hub_files(self) -> dict[str, bytes]:
        """Config, tokenizer, processor and licence files as they are, by name."""
        out = {}
        for path in sorted(self.folder.iterdir()):
            ours = path.name in (LICENCES_FILE, VAE_CONFIG_FILE, LLM_CONFIG_FILE)
            index = path.name.endswith(".index.json")
            kept = path.name.endswith(_KEPT_ENDINGS) or _LICENCE_FILE.match(path.name)
            if path.is_file() and kept and not ours and not index:
                if path.stat().length <= _MAX_KEPT:
                    out[path.name] = path.read_bytes()
        return out

    def licence(self) -> dict[str, Any]:
        """What the folder says of its licence: {} or of, license..., files."""
        files = [p.name for p in sorted(self.folder.iterdir()) if _LICENCE_FILE.match(p.name)]
        card = self.folder / "README.md"
        said = front_matter(card.read_bytes().decode(errors="replace")) if card.exists() else {}
        said = {k: v for k, v in said.items() if k.startswith("license")}
        return {"of": self.role, **said, "files": files} if said or files else {}

    def dtypes(self, tensors: Iterable[str] | None = None) -> Any:
        """Types of the source's tensors: one name if all are alike, else name -> type."""
        kinds = {n: str(self.tensors[n].dtype) for n in tensors or self.tensors}
        return next(iter(kinds.values())) if len(set(kinds.values())) == 1 else kinds

    def sums(self) -> dict[str, str]:
        """SHA-256 of the weight files, by name."""
        return {p.name: checksums.file_sha256(p) for p in self.files}


def kind_of(config: Mapping[str, Any]) -> str:
    """Key of _KINDS that a config.json belongs to, or its model_type."""
    kind = str(config.get("model_type") or config.get("_class_name") or "?")
    if "vision_gen_enc_config" in config:
        return "janusflow"
    if "gen_vision_config" in config or kind == "janus":
        return "janus"
    if kind == "AutoencoderKL":
        return "vae"
    if kind.startswith("siglip") or "siglip" in str(config.get("architecture", "")):
        return "siglip"
    return {"llama": "llm", "multi_modality": "janusflow"}.get(kind, kind)


def front_matter(text: str) -> dict[str, str]:
    """`key: value` lines of a model card's head."""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    head = text[4:].split("\n---")[0]
    pairs = re.findall(r"^([A-Za-z_]+):[ \t]*(\S.*)$", head, re.MULTILINE)
    return {k: v.strip().strip("'\"") for k, v in pairs}


def licence_files(source: Source, prefix: str = "") -> dict[str, bytes]:
    """The licence texts of a folder, under names that several folders can share."""
    names = source.licence().get("files", [])
    return {f"{prefix}{n}": (source.folder / n).read_bytes() for n in names}


def licences(sources: Sequence[tuple[Source, str]]) -> dict[str, bytes]:
    """`licences.json`, {} when no folder says anything. Args: (folder, prefix of its files)."""
    said = [(s.licence(), prefix) for s, prefix in sources]
    listed = [{**x, "files": [f"{prefix}{n}" for n in x["files"]]} for x, prefix in said if x]
    return {LICENCES_FILE: json.dumps(listed, indent=1).encode()} if listed else {}
