"""A space-filling order of a video's tokens, for attention that looks at blocks of consecutive tokens.

Row by row, 64 consecutive tokens are a thin strip of one frame. Here they are about a brick of 4x4x4, and bricks follow
each other to and fro, so that neighbours in the sequence are neighbours in the video. Where 4 does not divide an axis,
bricks are a token longer or shorter, never thin.

All that a transformer does with image tokens but attention looks at one token at a time, and attention asks for their
place only by their rotary angles: so latents go in with their patches in this order, the rotary table's rows too, and
the velocity's patches are put back. The model needs to know nothing of it. The first frame's tokens stay first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BRICK, FIRST_BRICK = (4, 4, 4), (1, 8, 8)


@dataclass(frozen=True)
class TokenOrder:
    """tokens: at each place of the sequence, the token's number in raster order, int64 [tokens]. pixels, back: the same
    permutation of the latents' T * H * W positions, and its inverse."""

    tokens: Tensor
    pixels: Tensor
    back: Tensor

    def arranged(self, latents: Tensor) -> Tensor:
        """latents [channels, T, H, W] with their patches moved, so that the patches in raster order are in this one."""
        return latents.flatten(1).index_select(1, self.pixels).view_as(latents)

    def restored(self, latents: Tensor) -> Tensor:
        """The inverse of `arranged`."""
        return latents.flatten(1).index_select(1, self.back).view_as(latents)

    def rope(self, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows of `rope_table` for tokens in this order."""
        cos, sin = table
        return cos.index_select(0, self.tokens), sin.index_select(0, self.tokens)

    def to(self, device: torch.device) -> TokenOrder:
        """On the device."""
        return TokenOrder(self.tokens.to(device), self.pixels.to(device), self.back.to(device))


def token_order(grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> TokenOrder:
    """The order of a token grid (time, rows, columns): the first frame, then the others. On the CPU."""
    t, h, w = grid
    tokens = torch.cat([brick_order((1, h, w), FIRST_BRICK), h * w + brick_order((t - 1, h, w), BRICK)])
    pt, ph, pw = patch_size
    numbers = torch.arange(t * pt * h * ph * w * pw).view(t, pt, h, ph, w, pw)
    patches = numbers.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)  # [tokens, positions of a patch]
    pixels = torch.empty_like(numbers.flatten())
    pixels[patches.flatten()] = patches[tokens].flatten()
    return TokenOrder(tokens, pixels, torch.argsort(pixels))


def brick_order(size: tuple[int, int, int], brick: tuple[int, int, int]) -> Tensor:
    """Places of a grid (time, rows, columns) in the order of bricks of about `brick`, to and fro: int64 indices.

    An axis reverses where the number of rows walked so far is odd, so that a step mostly leads to a neighbour: first
    from brick to brick, then inside each. When 4x4 tokens are walked in bricks of 2x2:

         0  1  7  6
         3  2  4  5
        15 14  8  9
        12 13 11 10
    """
    places = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    rank = torch.zeros_like(places[0])
    within = []
    for place, length, side in zip(places, size, brick, strict=True):
        bricks = max(1, round(length / side))
        number = place * bricks // max(1, length)
        first, end = -(-number * length // bricks), -(-(number + 1) * length // bricks)
        within.append((place - first, end - first, 2 * side))  # no brick is longer than that
        rank = rank * bricks + torch.where(rank % 2 == 1, bricks - 1 - number, number)
    walked = rank
    for place, lengths, longest in within:
        path = torch.where(walked % 2 == 1, lengths - 1 - place, place)
        rank, walked = rank * longest + path, walked * lengths + path
    return torch.argsort(rank.flatten(), stable=True)
