"""The repository of a Docker Space: `python launch/space/build.py --model runs/emoji --out DIR`.

DIR gets this checkout (the committed files that a server needs), the model as a folder with its
EMA weights only, the Dockerfile and the README. Push it to the Space with git; the weights may need
Git LFS.
"""

import argparse
import pathlib
import shutil
import subprocess

from janusflow_jax import cli
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import JanusFlowError

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "janusflow_jax")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a training run, a checkpoint or a model folder")
    p.add_argument("--out", required=True, help="a new folder")
    args = p.parse_args(argv)
    out = pathlib.Path(args.out)
    if out.exists():
        raise JanusFlowError(f"--out {out}: expected a new folder; it exists: remove it first")
    model = model_folder.load_model(args.model)
    (out / "project").mkdir(parents=True)
    command = ["git", "ls-files", "-z", *NEEDED]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        target = out / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    for name in ("Dockerfile", "README.md"):
        shutil.copy(HERE / name, out)
    model_folder.save_model(
        out / "model",
        model_cfg=model.cfg,
        params=model.params,
        vae=model.vae,
        hub_files=model.hub,
        extra={"made_by": "launch/space/build.py", "source": pathlib.Path(model.source).name},
    )
    print(out)


if __name__ == "__main__":
    cli.run(main)
