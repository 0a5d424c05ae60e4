"""A published folder (config files, weights, licenses) and what both conversions share."""

from __future__ import annotations

import concurrent.futures
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from huggingface_hub import metadata_load

from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import ModelConfig
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format
from janusflow_jax.hub import names, safetensors as safetensors_io, tensors

LICENSES_FILE, UNUSED_FILE = "licences.json", "unused.safetensors"
VAE_CONFIG_FILE, LLM_CONFIG_FILE = "vae_config.json", "llm_config.json"
_LICENSE_NAME = re.compile(r"(licen[cs]e|notice|copying|copyright)", re.IGNORECASE)
_COPIED_ENDINGS = (".json", ".model", ".txt", ".jinja")
_MAX_COPIED = 64 << 20

_KINDS = {
    "janusflow": "JanusFlow",
    "janus": "Janus or Janus-Pro, which generate images from a codebook (gen_vision_config)",
    "vae": "a VAE (AutoencoderKL)",
    "llm": "a Llama",
    "siglip": "a SigLIP",
}


class Source:
    """One published folder, opened: its config and the headers of its weights.

    Opening raises nothing: `problems` collects what is wrong and `notes` what a user should know.
    """

    def __init__(
        self, path: Any, role: str, weights: Sequence[str] = safetensors_io.WEIGHT_NAMES
    ) -> None:
        """Args: role: a key of _KINDS; weights: possible names of the weights."""
        self.folder, self.role = epath.Path(path), role
        opened = safetensors_io.open_folder(self.folder, weights)
        self.tensors: dict[str, Any] = dict(opened.tensors)
        self.files, self.problems, self.complete = opened.files, opened.problems, opened.complete
        self.notes = [f"{self.folder / n}: not read" for n in opened.ignored if opened.files]
        self.config: dict[str, Any] = {}
        if self.folder.is_dir():
            self.config = self.json("config.json", required=role != "siglip")
            if self.config and not self.right_kind:
                kind = kind_of(self.config)
                self.problems.append(
                    f"{self.folder / 'config.json'}: expected {_KINDS[role]}; got "
                    f"{_KINDS.get(kind, f'model_type {kind!r}')}"
                )

    @property
    def right_kind(self) -> bool:
        return kind_of(self.config) == self.role

    def json(self, name: str, required: bool = False) -> dict[str, Any]:
        """The object in a JSON file; {} if the file is missing or damaged."""
        path = self.folder / name
        if not path.exists():
            if required:
                self.problems.append(f"{path}: missing")
            return {}
        try:
            value = json.loads(path.read_text())
            if not isinstance(value, dict):
                raise ValueError(f"got {type(value).__name__}")
            return value
        except (OSError, ValueError) as error:
            self.problems.append(f"{path}: expected a JSON object; {error}")
            return {}

    def pop(self, pattern: str) -> dict[str, Any]:
        """Removes and returns the tensors whose names match."""
        popped = {n: x for n, x in self.tensors.items() if re.match(pattern, n)}
        self.tensors = {n: x for n, x in self.tensors.items() if n not in popped}
        return popped

    def drop(self, pattern: str, what: str) -> None:
        """Removes tensors that no model of ours uses, with a note."""
        if dropped := self.pop(pattern):
            self.notes.append(f"{self.folder}: {len(dropped)} tensors not used ({what})")

    def misfits(self, rules: list[names.Rule], expected: Any, dtype: Any) -> list[str]:
        """`tensors.problems` of this folder; none if some of its weights could not be read."""
        if not self.complete:
            return []
        problems = tensors.problems(self.tensors, rules, expected, dtype)
        return [f"{self.folder}: {p}" for p in problems]

    def hub_files(self) -> dict[str, bytes]:
        """Config, tokenizer, processor and license files by name."""
        reserved = (LICENSES_FILE, VAE_CONFIG_FILE, LLM_CONFIG_FILE)
        return {
            path.name: path.read_bytes()
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and (path.name.endswith(_COPIED_ENDINGS) or _LICENSE_NAME.match(path.name))
            and not path.name.endswith(".index.json")
            and path.name not in reserved
            and path.stat().length <= _MAX_COPIED
        }

    def license_texts(self) -> list[epath.Path]:
        return [p for p in sorted(self.folder.iterdir()) if _LICENSE_NAME.match(p.name)]

    def card_license(self) -> dict[str, str]:
        """The fields license, license_name, license_link of the model card; {} without a card."""
        card = self.folder / "README.md"
        try:
            fields = metadata_load(safetensors_io.local(card)) if card.exists() else None
        except Exception:  # noqa: BLE001 - YAML's errors have no base that callers know
            return {}
        return {k: str(v) for k, v in (fields or {}).items() if k.startswith("license")}

    def dtypes(self) -> Any:
        """One dtype name if all tensors have the same, else name -> dtype name."""
        kinds = {n: str(x.dtype) for n, x in self.tensors.items()}
        return next(iter(kinds.values())) if len(set(kinds.values())) == 1 else kinds

    def sums(self) -> dict[str, str]:
        """SHA-256 of the weight files by name."""
        return {p.name: checksums.file_sha256(p) for p in self.files}


def kind_of(config: Mapping[str, Any]) -> str:
    """The key of _KINDS that a config.json belongs to, or its model_type."""
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


def open_vae(path: Any) -> Source:
    """An AutoencoderKL's folder, its tensors under their current names."""
    source = Source(path, "vae", ("diffusion_pytorch_model",))
    if not source.files and (source.folder / "vae" / "config.json").exists():
        source.problems.append(f"{source.folder}: expected a VAE; use {source.folder / 'vae'}")
    for name in list(source.tensors):
        current = names.current_vae_name(name)
        if current != name and current in source.tensors:
            source.problems.append(f"{source.folder}: duplicate: {name} and {current}")
        source.tensors[current] = source.tensors.pop(name)
    return source


def load_chat_format(
    folder: epath.Path, num_image_tokens: int, problems: list[str]
) -> chat_format.ChatFormat | None:
    """The folder's tokenizer, or None and a problem."""
    try:
        return chat_format.ChatFormat.load(folder, num_image_tokens)
    except DataError as error:
        problems.append(str(error).replace("\n", " "))
    except Exception as error:  # noqa: BLE001 - the library raises its own and plain Exception
        problems.append(f"{folder}: cannot read the tokenizer; {error}")
    return None


def license_files(sources: Iterable[tuple[Source, str]]) -> dict[str, bytes]:
    """License texts, and what the model cards say of licenses, for the model folder's `hub/`.

    Args: sources: folders, each with a prefix for its files, since several share one folder.
    """
    out: dict[str, bytes] = {}
    listed = []
    for source, prefix in sources:
        texts = {f"{prefix}{p.name}": p.read_bytes() for p in source.license_texts()}
        fields = source.card_license()
        out |= texts
        if texts or fields:
            listed.append({"of": source.role, **fields, "files": list(texts)})
    return out | ({LICENSES_FILE: json.dumps(listed, indent=1).encode()} if listed else {})


def save_converted(
    out: Any,
    cfg: ModelConfig,
    parts: Iterator[tuple[str, Any]],
    sources: Sequence[Source],
    hub_files: dict[str, bytes],
    extra: dict[str, Any],
    overwrite: bool,
) -> None:
    """Writes the model folder. The sources' checksums are computed meanwhile."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    sums: dict[str, concurrent.futures.Future] = {}

    def hash_and_convert() -> Iterator[tuple[str, Any]]:
        sums.update({s.role: pool.submit(s.sums) for s in sources})
        yield from parts
        about["source_sha256"] = {role: x.result() for role, x in sums.items()}

    about: dict[str, Any] = {
        "made_by": "tools/convert_checkpoint.py",
        "source_dtypes": {s.role: s.dtypes() for s in sources},
        **extra,
    }
    try:
        model_folder.save_model(
            out,
            model_cfg=cfg,
            params=hash_and_convert(),
            vae=None,
            hub_files=hub_files,
            extra=about,
            overwrite=overwrite,
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
