"""`check-kernels`: whether the kernels compute on this card what they should, and what they gain.

Invariant: as in `cli`, nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from lowvram_i2v.errors import RequestError

if TYPE_CHECKING:
    from lowvram_i2v.kernel_check import Row

VIDEO, QUICK = (1280, 720, 129), (512, 320, 33)
"""Width, height and frames whose length is checked."""
TEXT_TOKENS = 400
"""Of the longest prompt with its picture."""
TOKEN_SIDE, FRAMES_A_TOKEN = 16, 4
"""Pixels and frames that one token stands for."""
MOST_TOKENS = 2**20
COLUMNS = (32, 14, 10, 8, 11, 12)
WAY_OUT = (
    "`generate` tries kernels on small inputs only and may use one that is wrong here; in a profile, "
    'attention = "sdpa" avoids our attention, compute = "w8a16" our 8-bit products'
)


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "check-kernels",
        help="compare every kernel with its definition on this card, and with torch's speed",
        description="Runs every op and attention backend on made-up tensors of the released model's sizes. Prints the "
        "relative error (L2) against float32, the largest that a right kernel has, and the time of a call beside "
        f"torch's. Exit status 1 if one is wrong: {WAY_OUT}.",
    )
    parser.set_defaults(command=_check)
    add = parser.add_argument
    size, quick = (f"{width}x{height}, {frames} frames" for width, height, frames in (VIDEO, QUICK))
    add("--quick", action="store_true", help=f"the length of {quick} instead of {size}")
    add("--tokens", type=int, metavar="N", help="another length of the sequence, picture and prompt together")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N (default %(default)s)")


def tokens_of(video: tuple[int, int, int]) -> int:
    """All tokens of a video and its prompt."""
    width, height, frames = video
    return ((frames - 1) // FRAMES_A_TOKEN + 1) * (width // TOKEN_SIDE) * (height // TOKEN_SIDE) + TEXT_TOKENS


def _check(options: argparse.Namespace) -> int:
    tokens = tokens_of(QUICK if options.quick else VIDEO) if options.tokens is None else options.tokens
    if not 1 <= tokens <= MOST_TOKENS:
        raise RequestError(f"--tokens is {tokens}.", f"Give a number from 1 to {MOST_TOKENS}.")

    from lowvram_i2v.device import describe, pick_device

    device = pick_device(options.device)
    print(f"{describe(device)}; {tokens} tokens", file=sys.stderr)

    from lowvram_i2v.kernel_check import check, peak_memory

    start = time.monotonic()
    print(line("op", "kernel", "error", "limit", "ms", "torch's ms", "verdict"), flush=True)
    rows = []
    for row in check(device, tokens):
        rows.append(row)
        print(shown(row), flush=True)
    wrong = [row for row in rows if not row.right]
    checked = sum(not row.skipped for row in rows)
    print(f"\n{checked - len(wrong)} of {checked} are right" + f"; {WAY_OUT}" * bool(wrong))
    if device.type != "cuda":
        print("Kernels need a CUDA card: only plain torch was checked, on a few rows.")
    took, peak = time.monotonic() - start, peak_memory(device) / 2**30
    print(f"{took:.0f} s, compiling included" + f"; {peak:.2f} GiB of video memory" * (peak > 0), file=sys.stderr)
    return 1 if wrong else 0


def shown(row: Row) -> str:
    """One line of the table."""
    error, limit = ("" if value is None else f"{value:.3%}" for value in (row.error, row.limit))
    ms, torchs = ("" if value is None else f"{value:.3f}" for value in (row.ms, row.torch_ms))
    return line(row.op, row.kernel, error, limit, ms, torchs, row.verdict)


def line(op: str, kernel: str, *cells: str) -> str:
    *numbers, verdict = cells
    right = (f"{cell:>{width}}" for cell, width in zip(numbers, COLUMNS[2:], strict=True))
    return f"{op:{COLUMNS[0]}}{kernel:{COLUMNS[1]}}{''.join(right)}  {verdict}"
