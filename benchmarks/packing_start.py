"""Time and memory to pack a huge source at the start of a run: `benchmarks/packing_start.py`.

Makes up the stored lengths of a data set (no records) and packs them in a process of its own, as
every process of a run does at its start. Prints seconds, the peak of memory, and the bins.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import resource
import tempfile
import time

import numpy as np

from janusflow_jax.data import chat_format, packing

HUB = pathlib.Path(__file__).parents[1] / "starts" / "emoji_llm" / "hub"
ROW, SLOT, SLOTS = 4096, 577, 6
TASKS = ("generate", "understand", "text")


class Unread:
    """A source of so many records, none of which is read."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


def make_up(folder: str, task: str, count: int) -> None:
    """Stores lengths: captions, conversations of up to 8 exchanges with an image each, or texts."""
    rng = np.random.default_rng(0)
    most = {"generate": 1, "understand": 8, "text": 1}[task]
    units = rng.integers(1, most + 1, count, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(units, dtype=np.int64)])
    del units
    mean, sigma = {"generate": (80, 0.7), "understand": (120, 0.6), "text": (900, 1.2)}[task]
    first = rng.standard_normal(int(offsets[-1]), np.float32)
    first = np.exp(np.log(mean) - sigma**2 / 2 + sigma * first).clip(2, 200_000).astype(np.int32)
    images = np.full(len(first), int(task != "text"), np.int32)
    text = np.full(count, task == "text")
    chat = chat_format.ChatFormat.load(HUB, SLOT - 1)
    file = packing.lengths_path(folder, "train", task, "chat", chat)
    file.parent.mkdir()
    lengths = packing.Lengths(offsets, text, first, first, images)
    np.savez(file, **lengths._asdict())


def measure(folder: str, task: str, count: int) -> None:
    chat = chat_format.ChatFormat.load(HUB, SLOT - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    chunks = packing.load_lengths(Unread(count), folder, "train", task, "chat", chat)
    slots = 0 if task == "text" else SLOTS
    samples, _ = packing.divide(chunks, SLOT, ROW, slots, head=1)
    bins = packing.pack(samples, ROW, slots)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = sum(x.nbytes for x in (bins.order, *samples) if x.strides != (0,))
    print(
        f"{task}: {count:,} records, {len(bins.order):,} samples: {seconds:.1f} s ({cpu:.1f} s of "
        f"CPU), peak {peak / 2**20:.2f} GiB (before: {before / 2**20:.2f}), then "
        f"{held / 2**30:.2f} GiB; {len(bins):,} bins in {len(bins.groups):,} groups, "
        f"{bins.num_positions / len(bins) / ROW:.2%} full"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--records", type=int, default=200_000_000)
    p.add_argument("--task", choices=TASKS, default="generate")
    args = p.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for step in (make_up, measure):
            process = spawn.Process(target=step, args=(folder, args.task, args.records))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
