#!/usr/bin/env python3
"""Serves a model by Ray Serve: one engine a replica, on any number of machines.

    python launch/ray_serve.py --replicas 4 --resources '{"TPU": 1}' [--address auto] [--dry-run] \
        -- --model gs://BUCKET/models/janusflow --allowed-hosts janusflow.example.org

Arguments after -- are those of `python -m janusflow_jax.serve`, without --host and --port. Every
machine has this checkout installed with the extras `serve` and `ray`, and sees the model's folder.
Ray answers on --host and --port of every node; put a load balancer before it, which also holds the
certificate. An API key comes from JANUSFLOW_API_KEY here and goes to every replica. As with one
server, another --host than 127.0.0.1 needs a key, or --no-auth after --.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import Any

KEY_VARIABLE = "JANUSFLOW_API_KEY"
READY_SECONDS = 1800
"""For the programs of a replica to compile, which takes longest at a first start."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of Ray, and the arguments of the server."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--replicas", type=int, default=1, metavar="N")
    p.add_argument(
        "--max-replicas", type=int, default=0, metavar="N", help="more than --replicas: autoscale"
    )
    p.add_argument(
        "--resources",
        type=json.loads,
        default={},
        metavar="JSON",
        help='of a replica, e.g. {"TPU": 1}, {"GPU": 1} or {"CPU": 4}; default {"CPU": 1}',
    )
    p.add_argument("--address", default="", help="of a Ray cluster, e.g. auto; default: a new one")
    p.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    p.add_argument("--port", type=int, default=8000, help="default 8000")
    p.add_argument("--dry-run", action="store_true", help="print what would be deployed")
    own, served = argv, []
    if "--" in argv:
        own, served = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = p.parse_args(own)
    if not served:
        p.error("expected arguments of janusflow_jax.serve after --, such as -- --model MODEL")
    # Last, so that it is the one that counts: whether a key is needed depends on it.
    return args, [*served, f"--host={args.host}"]


def deployment_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `ray.serve.deployment`."""
    resources = dict(args.resources)
    actor: dict[str, Any] = {
        "num_cpus": resources.pop("CPU", 1),
        "num_gpus": resources.pop("GPU", 0),
        "resources": resources,
    }
    if key := os.environ.get(KEY_VARIABLE):
        actor["runtime_env"] = {"env_vars": {KEY_VARIABLE: key}}
    options: dict[str, Any] = {
        "name": "janusflow",
        "max_ongoing_requests": 256,  # the engine's own queue refuses what is too much
        "graceful_shutdown_timeout_s": 60,
        "ray_actor_options": actor,
    }
    if args.max_replicas > args.replicas:
        limits = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        options["autoscaling_config"] = limits | {"target_ongoing_requests": 8}
    else:
        options["num_replicas"] = args.replicas
    return options


def application(options: dict[str, Any], served: list[str]) -> Any:
    """The Ray Serve application: `janusflow_jax.serve` in every replica."""
    from ray import serve

    @serve.deployment(**options)
    @serve.ingress()
    class Replica:
        """Takes requests once its engine has compiled, and is replaced when the engine dies."""

        def __serve_build_asgi_app__(self) -> Any:
            from janusflow_jax.serve import command

            self.server = command.build(command.parse(served))
            self.ready_by = time.monotonic() + READY_SECONDS
            return self.server.app

        async def check_health(self) -> None:
            """Ray waits for the first call before it sends requests; more calls follow."""
            status = self.server.engine.status()
            while status.alive and not (status.ready or status.draining):
                if time.monotonic() > self.ready_by:
                    raise RuntimeError(f"expected an engine that is ready in {READY_SECONDS} s")
                await asyncio.sleep(0.2)
                status = self.server.engine.status()
            if not status.alive:
                raise RuntimeError(f"the engine is dead: {status.error or 'it makes no progress'}")

    return Replica.bind()


def main(argv: list[str] | None = None) -> None:
    args, served = parse(sys.argv[1:] if argv is None else argv)
    from janusflow_jax.serve import command

    command.check(command.parse(served))  # here, and not only in every replica
    options = deployment_options(args)
    if args.dry_run:
        shown = json.loads(json.dumps(options))
        shown["ray_actor_options"].pop("runtime_env", None)  # it holds the key
        print(json.dumps({"deployment": shown, "serve": served, "port": args.port}, indent=1))
        return
    import ray
    from ray import serve

    ray.init(address=args.address or None)
    serve.start(http_options={"host": args.host, "port": args.port, "location": "EveryNode"})
    serve.run(application(options, served), name="janusflow", route_prefix="/")
    print(f"http://{args.host}:{args.port}", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    from janusflow_jax import cli

    cli.run(main)
