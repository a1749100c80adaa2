"""The whole path at full size, on one machine: `python tests/bench/full_size.py --work DIR --run PROFILE:WxHxFRAMES`.

Makes a 13B checkpoint with random weights in the released layout, component by component (a 64 GiB disk does not hold
source and result of everything at once), converts it to each scheme, deletes the source, and generates. Every command
runs in a process of its own through the command line; its wall time and peak resident memory are printed as table rows,
and `generate` prints its own table of planned and measured video memory. What lies in DIR already is not made again.
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


def run(*arguments: str) -> None:
    """One command of the program: wall time, peak resident memory, and of it what is no cached file (RssAnon)."""
    start, anonymous = time.perf_counter(), 0
    command = [sys.executable, "-m", "lowvram_i2v", *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            anonymous = max(anonymous, int(found[1]))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    shown = " ".join(argument for argument in arguments if len(argument) < 60)
    print(f"| {shown} | {seconds:.1f} s | {anonymous / 2**20:.2f} GiB RssAnon |", flush=True)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {shown}")


def make(work: Path, size: str, schemes: list[str]) -> None:
    """Model folders DIR/int8, DIR/fp8, ...: all components but the transformer are the same files."""
    released, first = work / "released", work / schemes[0]
    for component in ("text", "clip", "vae"):
        run("synth", str(released), "--size", size, "--component", component)
        run("convert", str(released), str(first), "--component", component, "--scheme", schemes[0])
        shutil.rmtree(released)
    run("synth", str(released), "--size", size, "--component", "transformer")
    for scheme in schemes:
        if scheme != schemes[0]:
            shutil.copytree(first, work / scheme, copy_function=os.link)
    for scheme in schemes:
        run("convert", str(released), str(work / scheme), "--component", "transformer", "--scheme", scheme)
    shutil.rmtree(released)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with 64 GiB free, for --size full")
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--scheme", nargs="+", default=["int8"])
    parser.add_argument("--run", nargs="*", default=[], metavar="PROFILE:WxHxFRAMES", help="for each scheme")
    parser.add_argument("--steps", default="3")
    parser.add_argument("--flags", default="", help="further flags of generate, in one string")
    parser.add_argument("--keep", type=Path, help="folder for the mp4s")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / options.scheme[-1] / "transformer.safetensors").is_file():
        make(options.work, options.size, options.scheme)
    photo = options.work / "photo.png"
    code = "import sys; from lowvram_i2v.sample_photo import draw_sample_photo; draw_sample_photo().save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(photo)], cwd=ROOT, check=True)
    for wanted in options.run:
        profile, video = wanted.split(":")
        width, height, frames = video.split("x")
        for scheme in options.scheme:
            output = (options.keep or options.work) / f"{scheme}-{Path(profile).stem}-{video}.mp4"
            run(
                *("generate", "--model", str(options.work / scheme), "--image", str(photo), "--seed", "1"),
                *("--prompt", "The ball rolls to the right.", "--profile", profile, "--size", f"{width}x{height}"),
                *("--frames", frames, "--steps", options.steps, "--output", str(output), *options.flags.split()),
            )


if __name__ == "__main__":
    main()
