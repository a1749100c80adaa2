"""The whole path at full size, on one machine: `python tests/bench/full_size.py --work DIR`.

Makes a 13B checkpoint with random weights in the released layout, component by component (a 64 GiB disk does not hold
source and result of everything at once), converts each, deletes the source, and generates. Every command runs in a
process of its own through the command line; its wall time and peak resident memory are printed as table rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> None:
    """One command of the program, its wall time, and the peak of its resident memory (page cache not counted)."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lowvram_i2v", *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    shown = " ".join(argument if len(argument) < 60 else "..." for argument in arguments)
    print(f"| {shown} | {seconds:.1f} s | {usage.ru_maxrss / 2**20:.2f} GiB RSS |", flush=True)
    if status:
        raise SystemExit(f"failed with {os.waitstatus_to_exitcode(status)}: {shown}")


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with 64 GiB free, for --size full")
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--scheme", default="bf16")
    parser.add_argument("--video", default="512x512", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", default="129")
    parser.add_argument("--steps", default="2")
    parser.add_argument("--output", type=Path, required=True, help="the mp4")
    options = parser.parse_args()
    released, model = options.work / "released", options.work / "model"
    options.work.mkdir(parents=True, exist_ok=True)
    for component in ("transformer", "text", "clip", "vae"):
        run("synth", str(released), "--size", options.size, "--component", component)
        source = tree_bytes(released)
        run("convert", str(released), str(model), "--component", component, "--scheme", options.scheme)
        shutil.rmtree(released)
        print(f"  {component}: {source / 1e9:.2f} GB read, model folder now {tree_bytes(model) / 1e9:.2f} GB")
    photo = options.work / "photo.png"
    code = "import sys; from lowvram_i2v.sample_photo import draw_sample_photo; draw_sample_photo().save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(photo)], cwd=ROOT, check=True)
    run(
        *("generate", "--model", str(model), "--image", str(photo), "--prompt", "The ball rolls to the right."),
        *("--size", options.video, "--frames", options.frames, "--steps", options.steps, "--seed", "1"),
        *("--output", str(options.output)),
    )


if __name__ == "__main__":
    main()
