"""Rotary position tables for the token grid of a video (RoPE, arXiv 2104.09864; RIFLEx, arXiv 2502.15894).

The head's channels are divided among time, rows and columns; frequency j of an axis with d channels is
theta^(-2j/d). Above 192 frames one time frequency is lowered, so that a long video does not repeat itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RIFLEX_ABOVE_FRAMES = 192


def token_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Tokens along time, rows and columns of a video in pixels: 4 frames a latent, 16 pixels a side of a token."""
    return ((frames - 1) // 4 + 1, height // 16, width // 16)


def rope_table(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float, frames: int
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, float32 [grid tokens, sum(dims) / 2], tokens frame by frame, row by row.

    `frames` is the video's length before the VAE: it decides about RIFLEx.
    """
    time, rows, columns = (_frequencies(dim, theta) for dim in dims)
    if frames > RIFLEX_ABOVE_FRAMES:
        time = _lower_one_frequency(time, latent_frames=grid[0], frames=frames)
    angles = [torch.outer(torch.arange(size).float(), f) for size, f in zip(grid, (time, rows, columns), strict=True)]
    t, h, w = grid
    table = torch.cat(
        [
            angles[0][:, None, None].expand(t, h, w, -1),
            angles[1][None, :, None].expand(t, h, w, -1),
            angles[2][None, None, :].expand(t, h, w, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return table.cos(), table.sin()


def _frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2j/dim), float32 [dim / 2]. The power is taken in float64 and rounded once: the same bits everywhere."""
    powers = theta ** (torch.arange(0, dim, 2).float() / dim).double()
    return 1.0 / powers.float()


def _lower_one_frequency(time: Tensor, latent_frames: int, frames: int) -> Tensor:
    """RIFLEx: the k-th time frequency gets a period longer than the video. It is never raised, unlike in the
    reference, where from about 300 frames the new value exceeds the old one."""
    k = min(max(2 + (frames + 3) // 100, 4), 8)
    time = time.clone()
    time[k - 1] = min(float(time[k - 1]), 0.9 * 2 * math.pi / latent_frames)
    return time
