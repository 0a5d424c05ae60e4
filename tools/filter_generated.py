"""Keeps the generated images that the model itself finds most like their prompts.

    python -m janusflow_jax.generate --model M --prompts prompts.txt --images-per-prompt 8 \\
        --out images --json images.json
    python tools/filter_generated.py --model M --report images.json --out rows.jsonl
    python tools/prepare_data.py folder images --rows rows.jsonl --out data/own --tokenizer M/hub

Of each prompt's images it keeps those for which the model finds the prompt most likely.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from janusflow_jax import cli
from janusflow_jax.config import files
from janusflow_jax.config.errors import JanusFlowError

DESCRIPTION = "Keeps the generated images that the model itself finds most like their prompts."


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("filter_generated", DESCRIPTION, "")
    p.prog = "python tools/filter_generated.py"
    p.add_argument("--report", required=True, help="of `generate --json`")
    p.add_argument("--keep", type=float, default=0.25, help="share of each prompt; default 0.25")
    p.add_argument("--out", required=True, help="rows for prepare_data.py, JSON lines")
    args = p.parse_args(argv)
    if not 0 < args.keep <= 1:
        raise JanusFlowError(f"--keep: expected a share above 0 and at most 1; got {args.keep}")
    out = cli.check_writable(args.out, "--out")
    records = read_report(args.report)
    model = cli.load(args)
    scores = model.caption_scores([x["file"] for x in records], [x["prompt"] for x in records])
    by_prompt: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_prompt.setdefault(record["prompt"], []).append(i)
    kept: list[int] = []
    for group in by_prompt.values():
        group.sort(key=lambda i: -scores[i])
        kept += group[: math.ceil(args.keep * len(group))]
    rows = [
        {
            "image": Path(records[i]["file"]).name,
            "caption": records[i]["prompt"],
            "seed": records[i]["seed"],
            "log_likelihood": round(float(scores[i]), 4),
        }
        for i in sorted(kept)
    ]
    with files.replacing(out) as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} of {len(records)} images")


def read_report(path: str) -> list[dict]:
    """The images of a report that were written, one file each.

    Raises: JanusFlowError: not such a report.
    """
    try:
        said = json.loads(files.resolve(path).read_text(encoding="utf-8"))
        records = said["images"] if "images" in said else said["pictures"]  # of an older version
        written = [x for x in records if x["file"]]
        names = {x["file"] for x in written}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise JanusFlowError(f"{path}: expected a report of `generate --json`") from error
    if not written or len(names) < len(written):
        raise JanusFlowError(
            f"{path}: expected images in a file each; got {len(written)} in {len(names)} files: "
            "generate with a folder as --out"
        )
    return written


if __name__ == "__main__":
    cli.run(main)
