"""Options -> a model, its engine and the server that listens."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import ipaddress
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import jax

from janusflow_jax import cli, pipeline
from janusflow_jax.config import fields, files
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import provenance
from janusflow_jax.serve import app, guard, listen, replicas
from janusflow_jax.serve.checks import ServedModel
from janusflow_jax.serve.limits import PUBLIC, Limits
from janusflow_jax.serve.requests import EngineSettings

KEY_VARIABLE = "JANUSFLOW_API_KEY"
DESCRIPTION = "Serves images and conversations by OpenAI's API, with a web page."
EPILOG = f"""\
examples:
  this machine only:    --model runs/emoji
  other machines:       {KEY_VARIABLE}=SECRET python -m janusflow_jax.serve --model M --host 0.0.0.0

The page is at http://127.0.0.1:8000, the API at http://127.0.0.1:8000/v1, and what may be asked at
/v1/models. /health, /ready and /metrics are for operators. The first SIGTERM or Ctrl-C refuses new
requests and lets running ones end; the second ends at once. See docs/serving.md."""
HELP = {
    "rows": "branches of images at once; a guided image has two",
    "lanes": "conversations at once",
    "context": "positions of a conversation, images and answer included; 0: 8 images and text",
    "prompt_tokens": "of an image's prompt",
    "queue": "images and chats that wait, of all clients",
    "queue_per_client": "images and chats that wait, of one client",
    "invariant": "one program shape: other load changes no bit of a result",
    "watchdog": "seconds without progress after which /health fails",
    "body_mib": "of a request",
    "image_mib": "of an image file",
    "image_megapixels": "of an image",
    "images": "in a conversation, 1 to 8",
    "prompt_chars": "of an image's prompt",
    "n": "images of a request",
    "steps": "of the solver",
    "guidance_scale": "highest",
    "partial_images": "of each image, while it is generated",
    "size": "side of an answered image, pixels",
    "connections": "at once",
    "header_seconds": "until the header of a request is there",
    "body_seconds": "until the body is there",
    "stall_seconds": "in which a client must read some of its answer",
    "deadline_seconds": "from a request to the end of its answer",
}
"""Of the options that are fields of EngineSettings and Limits."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser("serve", DESCRIPTION, EPILOG)
    p.add_argument("--name", default="", help="of the model in the API; default: its config's")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    p.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free one")
    p.add_argument(
        "--api-key-file",
        default="",
        metavar="FILE",
        help=f"one key a line; or one in {KEY_VARIABLE}",
    )
    p.add_argument("--no-auth", action="store_true", help="no key on another host than this one")
    p.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the Host header; default: local names and a local --host, or any with another",
    )
    p.add_argument(
        "--cors", nargs="+", default=[], metavar="ORIGIN", help="other pages that may use the API"
    )
    p.add_argument(
        "--trusted-proxies",
        default="",
        metavar="ADDRESSES",
        help="whose X-Forwarded-For is believed, with commas between",
    )
    p.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="engines, each on a device of this machine; 0: on all of them; default 1",
    )
    p.add_argument("--no-page", action="store_true", help="the API without the web page")
    p.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    p.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="for running requests; default 30"
    )
    tighter = ", ".join(f"{_flag(name)} {value}" for name, value in PUBLIC.items())
    p.add_argument(
        "--public",
        action="store_true",
        help=f"tighter limits for strangers: {tighter}",
    )
    for title, cls in (("engine", EngineSettings), ("limits", Limits)):
        group = p.add_argument_group(title)
        for field in dataclasses.fields(cls):
            _add_field(group, field)
    return p.parse_args(argv)


def _flag(name: str) -> str:
    """The option of a field of EngineSettings or Limits."""
    limit = name in {field.name for field in dataclasses.fields(Limits)}
    return ("--max-" if limit else "--") + name.replace("_", "-")


def _add_field(group: Any, field: dataclasses.Field) -> None:
    """The option of one field; None where it is not given."""
    flag, text = _flag(field.name), HELP[field.name]
    if field.default is False:
        group.add_argument(flag, dest=field.name, action="store_true", help=text)
        return
    group.add_argument(
        flag,
        dest=field.name,
        type=type(field.default),
        metavar="N",
        help=f"{text}; default {field.default}",
    )


def _values(args: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """The fields of a class that options set, with those of `--public`."""
    names = [field.name for field in dataclasses.fields(cls)]
    public = {n: x for n, x in PUBLIC.items() if args.public and n in names}
    return public | {n: x for n in names if (x := getattr(args, n)) is not None}


def check(args: argparse.Namespace) -> tuple[EngineSettings, Limits, list[str]]:
    """The engine's settings, the limits and the keys.

    Raises: JanusFlowError.
    """
    limits = Limits(**_values(args, Limits))
    problems = fields.type_problems(limits) + fields.problems_of_fields(limits)
    fields.raise_problems("the limits", problems)
    keys = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    if args.api_key_file:
        keys += [x.strip() for x in files.read_lines(files.resolve(args.api_key_file)) if x.strip()]
        if not keys:
            raise JanusFlowError(f"--api-key-file: expected a key a line in {args.api_key_file}")
    if args.no_auth and keys:
        raise JanusFlowError("--no-auth: expected no API key beside it; got one: leave one out")
    if not (_is_loopback(args.host) or keys or args.no_auth):
        raise JanusFlowError(
            f"--host {args.host}: expected {KEY_VARIABLE} or --api-key-file, because others can "
            "reach this address; got no key: set one, or say --no-auth"
        )
    return EngineSettings(**_values(args, EngineSettings)), limits, keys


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(args: argparse.Namespace) -> Sequence[str]:
    """Names that the Host header may have; empty: any."""
    if args.allowed_hosts or not _is_loopback(args.host):
        return args.allowed_hosts
    return (*guard.LOCAL_HOSTS, args.host)


def serve_model(model: pipeline.Pipeline, engine: Any, args: argparse.Namespace) -> ServedModel:
    """What the API tells of a model."""
    sha256 = provenance.digest(model.source, args.adapter)
    facts = {
        "dtype": model.dtype,
        "int8": args.int8,
        "device": cli.accelerator(),
        "jax": jax.__version__,
        "weights": args.weights,
        "invariant": args.invariant,
    }
    digest = hashlib.sha256(json.dumps([sha256, facts], sort_keys=True).encode()).hexdigest()
    return ServedModel(
        name=args.name or model.cfg.name,
        engine=engine.limits,
        sha256=sha256,
        facts=facts,
        fingerprint=f"jf-{digest[:16]}",
        created=int(time.time()),
    )


def build(args: argparse.Namespace) -> app.Server:
    """Loads the model of the options. `.app` of the result is an ASGI application, which also
    starts and closes the engine.

    Raises: JanusFlowError.
    """
    settings, limits, keys = check(args)
    model = cli.load(args)
    engine = replicas.on_devices(model, settings, args.replicas)
    return app.Server(
        engine,
        serve_model(model, engine, args),
        limits,
        hosts=host_names(args),
        origins=args.cors,
        keys=keys,
        log_prompts=args.log_prompts,
        page=not args.no_page,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(None if argv is None else list(argv))
    check(args)
    sock = listen.bind(args.host, args.port)  # an address in use fails before the model loads
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("jax", "absl", "uvicorn", "orbax", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    server = build(args)
    host, port = sock.getsockname()[:2]
    cli.log(f"{server.model.name}: http://{f'[{host}]' if ':' in host else host}:{port}")
    http = listen.DrainingServer(server, args.drain, args.trusted_proxies)
    http.run(sockets=[sock])
    if http.error:
        raise RuntimeError(f"the engine failed: {http.error}")
    if server.engine.status().alive:  # it compiles: XLA would crash while Python shuts down
        os._exit(0)
