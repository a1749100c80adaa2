"""How fast blocks come from the disk, and by which way: `python tests/bench/reading.py --folder DIR` or `--file FILE`.

Reads ranges as long as a double block in 8 bits, with 1 to 3 threads, into buffers as the mapped tier's ring has them:
through the system's cache of files (`buffered`), around it (`direct`), and by mapping the file into memory (`mmap`).
`cold`: the cache was told to drop the file. `warm`: the file was read just before. Prints one table, in GB/s, each the
better of two runs. `streaming/reading.py` (DIRECT) and `streaming/load.py` (READERS) are to be what is fastest cold.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from lowvram_i2v.streaming.arena import arena  # noqa: E402
from lowvram_i2v.streaming.reading import DiskFile, buffer_bytes  # noqa: E402

MB = 10**6
Read = Callable[[range, Tensor], None]


@contextmanager
def by_calls(path: Path, direct: bool) -> Iterator[Read]:
    with closing(DiskFile(path, direct)) as disk:
        if disk.direct != direct:
            print("  (direct reads are refused here: what follows is buffered)", file=sys.stderr)
        yield lambda wanted, buffer: disk.read(wanted, buffer, wanted.start % 4096)


@contextmanager
def by_mapping(path: Path) -> Iterator[Read]:
    with path.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) as mapped:
        mapped.madvise(mmap.MADV_SEQUENTIAL)

        def read(wanted: range, buffer: Tensor) -> None:
            part = torch.frombuffer(mapped, dtype=torch.uint8, count=len(wanted), offset=wanted.start)
            buffer[: len(wanted)] = part

        yield read


WAYS = {"buffered": partial(by_calls, direct=False), "direct": partial(by_calls, direct=True), "mmap": by_mapping}


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def seconds(path: Path, way: str, ranges: Sequence[range], buffers: Sequence[Tensor]) -> float:
    """To read all ranges, with as many threads as there are buffers."""
    left: SimpleQueue[range] = SimpleQueue()
    for wanted in ranges:
        left.put(wanted)

    def work(read: Read, buffer: Tensor) -> None:
        while True:
            try:
                wanted = left.get_nowait()
            except Empty:
                return
            read(wanted, buffer)

    with ExitStack() as stack:
        reads = [stack.enter_context(WAYS[way](path)) for _ in buffers]
        threads = [Thread(target=work, args=pair) for pair in zip(reads, buffers, strict=True)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


def best_of_two(path: Path, way: str, ranges: Sequence[range], buffers: Sequence[Tensor], cold: bool) -> float:
    taken = []
    for _ in range(2):
        if cold:
            drop_from_cache(path)
        taken.append(seconds(path, way, ranges, buffers))
    return min(taken)


@contextmanager
def file_to_read(options: argparse.Namespace) -> Iterator[Path]:
    """The one that was named, or one of random bytes that is gone afterwards."""
    if options.file:
        yield options.file
        return
    with tempfile.NamedTemporaryFile(dir=options.folder, suffix=".reading") as file:
        piece = torch.randint(0, 256, (64 * 2**20,), dtype=torch.uint8).numpy()
        for _ in range(-(-options.mb * MB // len(piece))):
            file.write(piece.data)
        file.flush()
        yield Path(file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a large file, such as a model folder's transformer.safetensors")
    parser.add_argument("--folder", type=Path, default=Path(), help="where a file is made if none is named")
    parser.add_argument("--mb", type=int, default=4000, help="how much is read in one run")
    parser.add_argument("--range-mb", type=int, default=226)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        file_to_read(options) as path,
        arena(max(options.threads) * buffer_bytes(options.range_mb * MB), device) as ring,
    ):
        buffers = ring.split(buffer_bytes(options.range_mb * MB))  # type: ignore[no-untyped-call]
        end, step = min(path.stat().st_size, options.mb * MB), options.range_mb * MB
        ranges = [range(start, start + step) for start in range(1000, end - step, step)]
        print(f"{len(ranges)} ranges of {options.range_mb} MB; GB/s, page-locked buffers: {device.type == 'cuda'}")
        print(f"| way | {' | '.join(f'{kind}, {n} threads' for kind in ('cold', 'warm') for n in options.threads)} |")
        print("|---|" + "---|" * 2 * len(options.threads))
        for way in WAYS:
            times = [
                best_of_two(path, way, ranges, buffers[:threads], cold)
                for cold in (True, False)
                for threads in options.threads
            ]
            row = [f"{len(ranges) * step / 1e9 / taken:.2f}" for taken in times]
            print(f"| {way} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
