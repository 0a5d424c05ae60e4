"""Published folders for tests to convert, and to spoil."""

import json

from safetensors.numpy import load_file, save_file

from janusflow_jax import hub

SILENT = {"log": lambda line: None}


def to_model(source, vae, out, **options):
    return hub.convert(source, vae, out, **{**SILENT, **options})


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard(folder, count=3):
    """Splits model.safetensors; returns the shards' names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = list(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {n: tensors[n] for n in names[i::count]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sorted(set(index.values()))
