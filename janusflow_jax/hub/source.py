"""A published folder (config files, weights, licenses) and what both conversions share."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import metadata_load

from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import ModelConfig, VaeConfig, files
from janusflow_jax.config.errors import ConvertError, JanusFlowError
from janusflow_jax.hub import names, safetensors as safetensors_io

LICENSES_FILE, UNUSED_FILE = "licences.json", "unused.safetensors"
VAE_CONFIG_FILE, LLM_CONFIG_FILE = "vae_config.json", "llm_config.json"
_LICENSE_NAME = re.compile(r"(licen[cs]e|notice|copying|copyright)", re.IGNORECASE)
_COPIED_ENDINGS = (".json", ".model", ".txt", ".jinja")


class Source:
    """One published folder, opened: the headers of its weights, and its JSON files.

    Args: weights: possible names of the weights.
    Raises:
      ConvertError, OSError: no such folder, or weights that are missing or damaged.
    """

    def __init__(self, path: Any, weights: Sequence[str] = safetensors_io.WEIGHT_NAMES) -> None:
        self.folder = files.resolve(path)
        self.files = safetensors_io.weight_files(self.folder, weights)
        self.tensors = safetensors_io.open_folder(self.folder, weights)

    def json(self, name: str, default: Any = None) -> Any:
        """The object in a JSON file, or the default where there is no file.

        Raises:
          CheckpointError: the file is damaged, or missing without a default.
          ConvertError: it holds no object.
        """
        path = self.folder / name
        if default is not None and not path.exists():
            return default
        values = checksums.read_json(path)
        if not isinstance(values, dict):
            raise ConvertError(f"{path}: expected a JSON object; got {type(values).__name__}")
        return values

    def pop(self, pattern: str) -> dict[str, safetensors_io.LazyTensor]:
        """Removes and returns the tensors whose names match."""
        return {n: self.tensors.pop(n) for n in list(self.tensors) if re.match(pattern, n)}

    def hub_files(self) -> dict[str, bytes]:
        """Config, tokenizer, processor and license files by name."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.folder.iterdir())
            if path.name.endswith(_COPIED_ENDINGS) or _LICENSE_NAME.match(path.name)
            if path.is_file() and not path.name.endswith(".index.json")
        }

    def dtypes(self) -> Any:
        """One dtype name if all tensors have the same, else name -> dtype name."""
        kinds = {n: str(x.dtype) for n, x in self.tensors.items()}
        return next(iter(kinds.values())) if len(set(kinds.values())) == 1 else kinds


def open_vae(path: Any) -> Source:
    """The folder of an autoencoder of diffusers, its tensors under their current names."""
    source = Source(path, ("diffusion_pytorch_model",))
    renamed = {names.current_vae_name(n): x for n, x in source.tensors.items()}
    if len(renamed) < len(source.tensors):
        raise ConvertError(f"{source.folder}: some tensors are there under an old and a new name")
    source.tensors = renamed
    return source


def pop_batch_norm(vae: Source) -> dict[str, Any]:
    """Removes and returns FLUX.2's buffers, which become a part of the config; {} without them."""
    return {name.removeprefix("bn."): x for name, x in vae.pop(r"bn\.").items()}


def log_missing_scale(vae: Source, cfg: VaeConfig, log: Callable[[str], None]) -> None:
    """Logs that a VAE's config has no scaling_factor: a wrong one changes every image."""
    if vae.json("config.json").get("scaling_factor") is None and cfg.scaling_factor != 1:
        log(
            f"{vae.folder / 'config.json'}: no scaling_factor: using diffusers' default "
            f"{cfg.scaling_factor}; the published JanusFlow's VAE (SDXL's) has "
            f"{VaeConfig().scaling_factor}"
        )


@contextlib.contextmanager
def reading_configs(*sources: Source) -> Iterator[None]:
    """A value of another type in a config file, or a missing one, is a ConvertError."""
    try:
        yield
    except JanusFlowError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        folders = " and ".join(str(source.folder) for source in sources)
        raise ConvertError(
            f"{folders}: the config files cannot be read: a key is missing or its value has "
            f"another type ({type(error).__name__}: {error})"
        ) from error


def license_files(sources: Mapping[str, Source]) -> dict[str, bytes]:
    """License texts, and what the model cards say of licenses, for the model folder's `hub/`.

    Files of all sources but the first, which share one folder, begin with the source's name.
    """
    out: dict[str, bytes] = {}
    listed = []
    for i, (name, source) in enumerate(sources.items()):
        prefix = f"{name}." if i else ""
        paths = [
            path
            for path in sorted(source.folder.iterdir())
            if _LICENSE_NAME.match(path.name) and path.is_file()
        ]
        texts = {f"{prefix}{p.name}": p.read_bytes() for p in paths}
        fields = {k: str(v) for k, v in _card_fields(source).items() if k.startswith("license")}
        out |= texts
        if texts or fields:
            listed.append({"of": name, **fields, "files": list(texts)})
    return out | ({LICENSES_FILE: json.dumps(listed, indent=1).encode()} if listed else {})


def _card_fields(source: Source) -> dict[str, Any]:
    """The fields of a model card's head; {} if it has none that can be read."""
    card = source.folder / "README.md"
    try:
        return metadata_load(safetensors_io.local(card)) or {} if card.exists() else {}
    except Exception:  # noqa: BLE001 - broken YAML raises errors without a common base
        return {}


def save_converted(
    out: Any,
    cfg: ModelConfig,
    parts: Iterator[tuple[str, Any]],
    sources: Mapping[str, Source],
    hub_files: dict[str, bytes],
    overwrite: bool,
    licenses: Mapping[str, bytes] | None = None,
    **extra: Any,
) -> None:
    """Writes the model folder, with the checksums of the sources' weights.

    Args: licenses: files of `hub/`; default: `license_files` of the sources.
    """
    licenses = license_files(sources) if licenses is None else licenses
    about = {
        "made_by": "tools/convert_checkpoint.py",
        "source_dtypes": {name: s.dtypes() for name, s in sources.items()},
        **extra,
    }

    def parts_and_sums() -> Iterator[tuple[str, Any]]:
        yield from parts
        about["source_sha256"] = {
            name: {p.name: checksums.file_sha256(p) for p in s.files} for name, s in sources.items()
        }

    model_folder.save_model(
        out,
        model_cfg=cfg,
        params=parts_and_sums(),
        vae=None,
        hub_files={**hub_files, **licenses},
        extra=about,
        overwrite=overwrite,
    )
