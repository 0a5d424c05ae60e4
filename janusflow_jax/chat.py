"""Answers questions about images:
`python -m janusflow_jax.chat --model runs/emoji --image x.png --prompt "What is it?"`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from janusflow_jax import cli
from janusflow_jax.data import images as images_lib
from janusflow_jax.sampling import inputs

DESCRIPTION = "Answers one question; without --prompt, holds a conversation."
COMMANDS = """\
  /image FILE   sends an image with your next message (repeat for several)
  /new          starts a new conversation
  /help         prints this list
  /quit         ends the program (as an empty line and Ctrl-D do)"""
EPILOG = f"""\
examples:
  one question:    --model runs/emoji --image apple.png --prompt "Describe the picture."
  two images:      --model MODEL --image a.png --image b.png --prompt "What differs?"
  a conversation:  --model MODEL --image a.png

in a conversation:
{COMMANDS}

Images of the command line go with the first message, before its text. To place them yourself, write
<image_placeholder> once for each image. Every other tag is plain text."""


OUT_OF_MEMORY = (
    "use a shorter text, fewer images, a smaller --max-new-tokens, --dtype bfloat16 or --int8"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("chat", DESCRIPTION, EPILOG)
    p.add_argument(
        "--image",
        action="append",
        default=[],
        help="a JPEG, PNG or WebP file, not a URL; repeatable",
    )
    p.add_argument("--prompt", help="the question; without it a conversation starts")
    p.add_argument("--system", help="replaces the model's system prompt; '' for none")
    p.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default 512")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    p.add_argument("--seed", type=int, default=0, help="of sampling, above temperature 0")
    return p.parse_args(argv)


class Conversation:
    """The turns and images so far; answers are printed as they are generated."""

    def __init__(self, model: Any, images: list[Any], system: str | None, options: dict) -> None:
        self.model, self.options = model, options
        self.start = [] if system is None else [{"role": "System", "content": system}]
        self.turns: list[dict[str, str]] = list(self.start)
        self.images, self.pending = [], list(images)

    def ask(self, question: str) -> None:
        """Prints the answer. If that raises, the conversation stays as it was."""
        question = inputs.with_tags(question, len(self.pending), self.model.text.image_tag)
        turns = [*self.turns, {"role": "User", "content": question}]
        images = [*self.images, *self.pending]
        answer = ""
        for piece in self.model.stream(turns, images, **self.options):
            print(piece, end="", flush=True)
            answer += piece
        print()
        self.turns = [*turns, {"role": "Assistant", "content": answer}]
        self.images, self.pending = images, []

    def command(self, line: str) -> bool:
        """Runs a line that starts with a slash. Returns whether to continue."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/image":
            self.pending.append(images_lib.read(rest.strip().strip("'\"")))
            cli.log(f"({len(self.pending)} image(s) go with your next message)")
        elif name == "/new":
            self.turns, self.images, self.pending = list(self.start), [], []
            cli.log("(a new conversation)")
        elif name == "/help":
            cli.log(COMMANDS)
        else:
            cli.log(f"unknown command {name}; the commands are:\n{COMMANDS}")
        return True

    def run(self) -> None:
        """Reads lines until an empty one, /quit or the end of the input."""
        while line := _read_line():
            try:
                if not line.startswith("/"):
                    self.ask(line)
                elif not self.command(line):
                    return
            except Exception as error:  # noqa: BLE001  no message ends the conversation
                advice = f"{OUT_OF_MEMORY}, or start a new conversation (/new)"
                reason = cli.explain(error, advice) or f"{type(error).__name__}: {error}"
                cli.log(f"error: {reason}")


def _read_line() -> str:
    try:
        return input("You: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    images = [images_lib.read(path) for path in args.image]  # a wrong path fails before loading
    options = {n: getattr(args, n) for n in ("max_new_tokens", "temperature", "top_p", "seed")}
    inputs.check_chat(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    conversation = Conversation(cli.load(args), images, args.system, options)
    if args.prompt is not None:
        conversation.ask(args.prompt)
        return
    cli.log("Type a message; /help lists the commands, an empty line ends.")
    conversation.run()


if __name__ == "__main__":
    cli.run(main, out_of_memory=OUT_OF_MEMORY)
