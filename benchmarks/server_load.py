"""A running server under Poisson traffic: `python benchmarks/server_load.py http://127.0.0.1:8000`.

Images (one to four of them, 4 to 16 steps, guided or not, some streamed), conversations with and
without an image, and clients that hang up arrive at random. Each finished image is compared with
the image of the same settings that was generated before the load: byte for byte with `--exact` (a
server with --invariant), else within a few values. Prints codes, times, the delays of /health and
the server's memory over time. Start the server with --queue-per-client above the number of requests
that may wait at once, because all traffic here comes from one address.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import random
import re
import threading
import time
from typing import Any

import httpx
import numpy as np
from PIL import Image

CASES = [(n, steps, scale) for n in (1, 2, 4) for steps in (4, 10, 16) for scale in (1.0, 2.0)]
SAMPLE_SECONDS = 1.0


def body_of(case: tuple[int, int, float]) -> dict[str, Any]:
    n, steps, scale = case
    return {
        "prompt": "a red apple",
        "n": n,
        "seed": 5,
        "num_inference_steps": steps,
        "guidance_scale": scale,
    }


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


class Load:
    """The traffic of one run, and what came of it."""

    def __init__(self, client: httpx.AsyncClient, args: argparse.Namespace):
        self.client, self.args, self.random = client, args, random.Random(args.seed)
        self.want: dict[Any, list[np.ndarray]] = {}
        self.codes: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.health: list[float] = []
        self.memory: list[tuple[float, float]] = []
        self.worst = 0

    async def reference(self) -> None:
        """Images without load, and how many requests a second that allows."""
        begin = time.monotonic()
        for case in CASES:
            answer = await self.client.post("/v1/images/generations", json=body_of(case))
            answer.raise_for_status()
            self.want[case] = [pixels(x["b64_json"]) for x in answer.json()["data"]]
        self.alone = (time.monotonic() - begin) / len(CASES)
        print(f"one request at a time: {self.alone:.2f} s on average")

    async def run(self) -> None:
        begin, requests = time.monotonic(), set[asyncio.Task]()
        ended = threading.Event()
        watcher = threading.Thread(target=self.watch, args=(begin, ended))
        watcher.start()
        while time.monotonic() - begin < self.args.seconds:
            await asyncio.sleep(self.random.expovariate(self.args.load / self.alone))
            kinds = (self.images, self.images, self.streamed, self.chat, self.leave)
            task = asyncio.ensure_future(self.random.choice(kinds)())
            requests.add(task)
            task.add_done_callback(requests.discard)
        await asyncio.gather(*requests)
        ended.set()
        watcher.join()

    def watch(self, begin: float, ended: threading.Event) -> None:
        """In a thread of its own: the event loop of the traffic is busy with images."""
        with httpx.Client(base_url=self.args.url, timeout=60) as client:
            while not ended.wait(SAMPLE_SECONDS):
                start = time.monotonic()
                client.get("/health").raise_for_status()
                self.health.append(time.monotonic() - start)
                text = client.get("/metrics").text
                match = re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
                if match:
                    self.memory.append((start - begin, float(match[1]) / 2**20))

    def compare(self, case: Any, data: list[str]) -> None:
        for got, want in zip(map(pixels, data), self.want[case], strict=True):
            difference = int(np.abs(got - want).max())
            self.worst = max(self.worst, difference)
            if difference > (0 if self.args.exact else self.args.tolerance):
                self.codes["other pixels"] += 1

    def ended(self, kind: str, status: int, start: float) -> None:
        self.codes[f"{kind} {status}"] += 1
        if status == 200:
            self.seconds[kind].append(time.monotonic() - start)

    async def images(self) -> None:
        start, case = time.monotonic(), self.random.choice(CASES)
        answer = await self.client.post("/v1/images/generations", json=body_of(case))
        self.ended("images", answer.status_code, start)
        if answer.status_code == 200:
            self.compare(case, [x["b64_json"] for x in answer.json()["data"]])

    async def streamed(self) -> None:
        start, case = time.monotonic(), self.random.choice(CASES)
        body = body_of(case) | {"stream": True, "partial_images": 2}
        answer = await self.client.post("/v1/images/generations", json=body)
        self.ended("streamed images", answer.status_code, start)
        if answer.status_code == 200:
            done = re.findall(r'"image_generation.completed", "b64_json": "([^"]+)"', answer.text)
            if len(done) != case[0]:
                self.codes["streams without all images"] += 1

    async def chat(self) -> None:
        start, content = time.monotonic(), [{"type": "text", "text": "What is it?"}]
        if self.random.random() < 0.5:
            file = io.BytesIO()
            Image.new("RGB", (200, 300), (200, 30, 30)).save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})  # type: ignore
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16}
        answer = await self.client.post("/v1/chat/completions", json=body)
        self.ended("chats", answer.status_code, start)

    async def leave(self) -> None:
        body = body_of(self.random.choice(CASES))
        try:
            await self.client.post("/v1/images/generations", json=body, timeout=0.05)
        except httpx.TimeoutException:
            self.codes["left"] += 1

    def report(self) -> None:
        for name, count in sorted(self.codes.items()):
            print(f"{name}: {count}")
        for kind, seconds in self.seconds.items():
            p50, p95 = np.percentile(seconds, (50, 95))
            print(f"{kind}: p50 {p50:.2f} s, p95 {p95:.2f} s of {len(seconds)}")
        print(f"largest difference of a pixel: {self.worst} of 255")
        p99 = np.percentile(self.health, 99)
        print(f"/health: p99 {p99 * 1e3:.0f} ms, max {max(self.health) * 1e3:.0f} ms")
        for i in range(0, len(self.memory), max(1, len(self.memory) // 12)):
            print(f"memory after {self.memory[i][0]:.0f} s: {self.memory[i][1]:.0f} MiB")


async def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("url")
    p.add_argument("--seconds", type=float, default=600.0)
    p.add_argument("--load", type=float, default=1.0, help="1: as much as one after the other")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--exact", action="store_true", help="images must be equal bit for bit")
    p.add_argument("--tolerance", type=int, default=3, help="otherwise, of 255")
    args = p.parse_args()
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=args.url, timeout=700, limits=limits) as client:
        load = Load(client, args)
        await load.reference()
        await load.run()
        load.report()


if __name__ == "__main__":
    asyncio.run(main())
