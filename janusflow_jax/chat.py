"""Answers about pictures:
`python -m janusflow_jax.chat --model runs/emoji --image x.png --prompt "What is it?"`.
"""

from __future__ import annotations

import argparse
import sys

from janusflow_jax import checkpoint, pipeline
from janusflow_jax.data import images


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m janusflow_jax.chat",
        description="Answers one question, or (without --prompt) talks until an empty line.",
    )
    p.add_argument("--model", required=True, help="model folder, workdir or one checkpoint of it")
    p.add_argument("--image", action="append", default=[], help="a picture; repeatable")
    p.add_argument("--prompt", help="the question; without it, an interactive chat")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by accelerator")
    p.add_argument("--weights", choices=("ema", "params"), default="ema")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pictures = [images.read(path) for path in args.image]  # a wrong path fails before loading
    model = pipeline.load(args.model, dtype=args.dtype, weights=args.weights)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }

    def answer(turns: str | list[dict[str, str]]) -> str:
        said = []
        for piece in model.stream(turns, pictures, **options):
            print(piece, end="", flush=True)
            said.append(piece)
        print()
        return "".join(said)

    if args.prompt is not None:
        answer(args.prompt)
        return
    turns: list[dict[str, str]] = []
    tag = model.text.image_tag
    while question := input("You: ").strip():
        front = "" if turns else f"{tag}\n" * len(pictures)
        turns += [
            {"role": "User", "content": front + question},
            {"role": "Assistant", "content": ""},
        ]
        turns[-1]["content"] = answer(turns)


def run() -> None:
    """The command line; errors that the user can mend are one message, not a stack."""
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
    except (checkpoint.CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
