"""The commands around finished latents and videos: decode, compare. Flags become values here; `cli` has the others.

Invariant: as in `cli`, nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowvram_i2v.console import Console
from lowvram_i2v.demo_model import model_path
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Notice
from lowvram_i2v.profile import DECODE_POLICIES, DEFAULT_PROFILE


def add_commands(commands: Any) -> None:
    _add_decode(commands)
    _add_compare(commands)


def _add_decode(commands: Any) -> None:
    parser = commands.add_parser(
        "decode",
        help="make the video of saved latents: later, again, or after a crash",
        description="Makes the video of the latents that `generate` leaves until its video is complete.",
    )
    parser.set_defaults(command=_decode)
    add = parser.add_argument
    add("latents", type=Path, metavar="FILE.safetensors", help="OUTPUT.mp4.latents.safetensors")
    add("--model", type=model_path, metavar="DIR", help="model folder (default: the one the latents were made with)")
    add("--output", type=Path, metavar="FILE.mp4", help="(default: the video that `generate` was to write)")
    add("--policy", choices=DECODE_POLICIES, help="how the VAE works, instead of the profile's way")
    add("--profile", metavar="NAME", default=DEFAULT_PROFILE, help="see `lowvram-i2v profiles` (default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N (default %(default)s)")


def _decode(options: argparse.Namespace) -> int:
    from lowvram_i2v.device import describe, pick_device
    from lowvram_i2v.latents_file import open_latents, output_of
    from lowvram_i2v.profile import load_profile

    console = Console()
    latents = open_latents(options.latents)
    model = options.model or (latents.model and model_path(str(latents.model)))
    if model is None:
        raise RequestError("--model not given, and the latents do not name one", "Name the model folder.")
    output = options.output or output_of(options.latents)
    if output is None:
        raise RequestError("--output not given, and the name of the latents does not tell it", "Name the mp4 to write.")
    profile = load_profile(options.profile)
    if options.policy is not None:
        profile = replace(profile, decode=options.policy)
    device = pick_device(options.device)
    console(Notice(f"{describe(device)}; profile {profile.name}; decode {profile.decode}"))

    from lowvram_i2v.pipeline import decode_file

    path = decode_file(latents, model, profile, device, output, console)
    print(console.table(), file=sys.stderr)
    print(path)
    return 0


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="how far two videos are apart: PSNR, SSIM, brightness, jumps between frames, tile borders",
        description="Compares two videos of equal size and length; b is judged against a. Where a decoder's tiles may "
        "have met, step and bend of brightness are given in units of their level inside the tiles: 1 is no seam.",
    )
    parser.set_defaults(command=_compare)
    add = parser.add_argument
    add("a", type=Path, metavar="A.mp4")
    add("b", type=Path, metavar="B.mp4")
    add("--per-frame", action="store_true", help="also a line for each frame, tab-separated")
    add("--tile", type=int, metavar="N", help="pixels of the tiles whose borders are looked at (default: as released)")
    add("--tile-frames", type=int, metavar="N", help="and their frames")


def _compare(options: argparse.Namespace) -> int:
    from lowvram_i2v.compare import compare_videos
    from lowvram_i2v.seams import SMALLEST_TILE, Tiles

    given = {"pixels": options.tile, "frames": options.tile_frames}
    sizes = {name: size for name, size in given.items() if size is not None}
    if small := [f"{size} {name}" for name, size in sizes.items() if size < SMALLEST_TILE]:
        raise RequestError(f"a tile of {' and '.join(small)} is too small", f"Give {SMALLEST_TILE} or more.")
    comparison = compare_videos(options.a, options.b, Tiles(**sizes))
    for line in (*comparison.lines(), *(comparison.table() if options.per_frame else [])):
        print(line)
    return 0
