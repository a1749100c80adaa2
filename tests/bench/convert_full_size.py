"""Converting at full size, beside plain copying of as many bytes: `python tests/bench/convert_full_size.py --work DIR`.

Makes a 13B transformer with random weights in the released layout (26 GB), times plainly reading it and plainly writing
13 GB with fsync, then `convert` to each scheme, then the same for the text encoder. Before each of these the files'
pages are dropped from the page cache, as far as the system does that when asked. Prints table rows: wall time, the
ratio to the plain copy, and the peak of anonymous resident memory (RssAnon: what the page cache cannot give back),
sampled every 20 ms. Needs 40 GB of disk. Every command runs in a process of its own through the command line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIECE = 16 * 2**20


def run(*arguments: str) -> tuple[float, int]:
    """One command of the program: wall seconds, peak RssAnon in bytes."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "lowvram_i2v", *arguments], cwd=ROOT)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(arguments)}")
    return seconds, peak


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_cache(folder: Path) -> None:
    os.sync()
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(folder: Path) -> tuple[float, int]:
    """Seconds and bytes of reading all files of a folder into one buffer."""
    buffer, total, start = bytearray(PIECE), 0, time.perf_counter()
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return time.perf_counter() - start, total


def plain_write(path: Path, size: int) -> float:
    """Seconds of writing `size` bytes and bringing them to the disk."""
    buffer, start = os.urandom(PIECE), time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for done in range(0, size, PIECE):
            file.write(buffer[: min(PIECE, size - done)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def measure(work: Path, size: str, component: str, conversions: list[list[str]]) -> None:
    released, model = work / "released", work / "model"
    seconds, peak = run("synth", str(released), "--size", size, "--component", component)
    print(f"| synth {component} | {seconds:.1f} s | | {peak / 2**30:.2f} GiB |", flush=True)
    drop_cache(released)
    reading, source = plain_read(released)
    writing = plain_write(work / "plain", source // 2)
    plain = reading + writing
    print(
        f"| plainly read {source / 1e9:.2f} GB ({reading:.1f} s), write {source / 2e9:.2f} GB ({writing:.1f} s) "
        f"| {plain:.1f} s | 1.00 | |",
        flush=True,
    )
    for flags in conversions:
        drop_cache(released)
        seconds, peak = run("convert", str(released), str(model), "--component", component, *flags)
        written = sum(path.stat().st_size for path in files_of(model))
        print(
            f"| convert {component} {' '.join(flags)} -> {written / 1e9:.2f} GB "
            f"| {seconds:.1f} s | {seconds / plain:.2f} | {peak / 2**30:.2f} GiB |",
            flush=True,
        )
        if flags is not conversions[-1]:
            shutil.rmtree(model)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lowvram_i2v", "verify", str(model)], cwd=ROOT, check=True)
    print(f"| verify {component} | {time.perf_counter() - start:.1f} s | | |", flush=True)
    shutil.rmtree(model)
    shutil.rmtree(released)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with 40 GB free, for --size full")
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| what | wall | against plain | peak RssAnon |\n|---|---|---|---|")
    transformer = [["--scheme", "int8"], ["--scheme", "int8", "--device", "cpu"], ["--scheme", "fp8"]]
    measure(options.work, options.size, "transformer", transformer)
    measure(options.work, options.size, "text", [["--text-scheme", "fp8"]])


if __name__ == "__main__":
    main()
