"""Answers about pictures:
`python -m janusflow_jax.chat --model runs/emoji --image x.png --prompt "What is it?"`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from janusflow_jax import cli
from janusflow_jax.data import images
from janusflow_jax.sampling import inputs

DESCRIPTION = "Answers one question, or (without --prompt) talks."
COMMANDS = """\
  /image FILE   shows a picture with your next message (repeat for several)
  /new          forgets the conversation
  /help         this list
  /quit         ends (so do an empty line and Ctrl-D)"""
EPILOG = f"""\
examples:
  one question:    --model runs/emoji --image apple.png --prompt "Describe the picture."
  two pictures:    --model MODEL --image a.png --image b.png --prompt "What differs?"
  a conversation:  --model MODEL --image a.png

in a conversation:
{COMMANDS}

Pictures of the command line belong to the first message and stand before its text. To place them
yourself, write <image_placeholder> once for each picture; every other tag is plain text."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("chat", DESCRIPTION, EPILOG)
    p.add_argument("--image", action="append", default=[], help="a picture's file; repeatable")
    p.add_argument("--prompt", help="the question; without it, a conversation")
    p.add_argument("--system", help="a system prompt instead of the model's own; '' for none")
    p.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default 512")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    p.add_argument("--seed", type=int, default=0, help="of the drawn tokens, above temperature 0")
    return p.parse_args(argv)


class Conversation:
    """Turns and pictures so far; answers are printed as they come."""

    def __init__(self, model: Any, pictures: list[Any], system: str | None, options: dict) -> None:
        self.model, self.options = model, options
        self.start = [] if system is None else [{"role": "System", "content": system}]
        self.turns: list[dict[str, str]] = list(self.start)
        self.pictures, self.pending = [], list(pictures)

    def ask(self, question: str) -> None:
        """Prints the answer. A question that cannot be asked leaves the conversation as it was."""
        tag = self.model.text.image_tag
        front = "" if tag in question else f"{tag}\n" * len(self.pending)
        turns = [*self.turns, {"role": "User", "content": front + question}]
        pictures = [*self.pictures, *self.pending]
        said = []
        for piece in self.model.stream(turns, pictures, **self.options):
            print(piece, end="", flush=True)
            said.append(piece)
        print()
        self.turns = [*turns, {"role": "Assistant", "content": "".join(said)}]
        self.pictures, self.pending = pictures, []

    def command(self, line: str) -> bool:
        """Does what a line with a slash asks for. Returns whether to go on."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/image":
            self.pending.append(images.read(rest.strip().strip("'\"")))
            cli.log(f"({len(self.pending)} picture(s) go with your next message)")
        elif name == "/new":
            self.turns, self.pictures, self.pending = list(self.start), [], []
            cli.log("(a new conversation)")
        elif name == "/help":
            cli.log(COMMANDS)
        else:
            cli.log(f"unknown command {name}; known are:\n{COMMANDS}")
        return True

    def talk(self) -> None:
        """Reads lines until an empty one, /quit or the end of the input."""
        while line := _read_line():
            try:
                if not line.startswith("/"):
                    self.ask(line)
                elif not self.command(line):
                    return
            except (ValueError, OSError) as error:  # one bad line does not end the conversation
                cli.log(f"error: {error}")


def _read_line() -> str:
    try:
        return input("You: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pictures = [images.read(path) for path in args.image]  # a wrong path fails before loading
    options = {n: getattr(args, n) for n in ("max_new_tokens", "temperature", "top_p", "seed")}
    inputs.check_chat(args.max_new_tokens, args.temperature, args.top_p)
    conversation = Conversation(cli.load(args), pictures, args.system, options)
    if args.prompt is not None:
        conversation.ask(args.prompt)
        return
    cli.log("Your message; /help for what else you can type, an empty line to end.")
    conversation.talk()


if __name__ == "__main__":
    cli.run(main)
