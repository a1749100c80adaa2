"""Encoding and decoding in overlapping tiles, with the reference's tiles and its way of mixing them.

Tiles overlap in space and in time. In an overlap the new tile fades in from weight 0, and what it fades out
is the *mixed* neighbour: rows first (tile above), then columns (tile to the left), then time. So the order
matters, and is the reference's. Each tile has moments of its own in every group norm and sees no further than
its border: the result is near the untiled one, not equal to it.

Invariants: what fits in one tile is not tiled; the result has the untiled shape; mixing is done in float32.
A finished tile is kept only as the border that its neighbours need. Differentiable.
Source: the released VAE code, `autoencoder_kl_causal_3d`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.vae.config import VaeConfig
from lowvram_i2v.vae.decoder import VaeDecoder
from lowvram_i2v.vae.encoder import VaeEncoder, split_moments

TIME, ROWS, COLUMNS = 1, 2, 3


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and the distances from one tile to the next, in latents.

    A tile in time takes one latent frame more than `tile_frames`: every tile but the first drops what its
    first latent frame gives, because that frame is treated as the first of a video.
    """

    tile: int
    stride: int
    tile_frames: int
    stride_frames: int
    spatial_ratio: int
    time_ratio: int

    @classmethod
    def from_config(cls, config: VaeConfig) -> Tiling:
        """The reference's tiles. CheckpointError if tile and overlap do not come out at whole latents: with
        such settings the reference joins tiles that do not meet."""
        overlap = config.tile_overlap_factor
        tile, stride = _whole_latents("sample_size", config.sample_size, config.spatial_ratio, overlap)
        frames, stride_frames = _whole_latents("sample_tsize", config.sample_tsize, config.time_ratio, overlap)
        return cls(tile, stride, frames, stride_frames, config.spatial_ratio, config.time_ratio)


def decode_tiled(decoder: VaeDecoder, latent: Tensor, tiling: Tiling) -> Tensor:
    """latent [16, T, h, w], divided by the scaling factor -> [3, 4 (T - 1) + 1, 8 h, 8 w] float32."""
    return torch.cat(list(decode_segments(decoder, latent, tiling)), TIME)


def decode_segments(decoder: VaeDecoder, latent: Tensor, tiling: Tiling) -> Iterator[Tensor]:
    """`decode_tiled` one time tile after another: finished frames [3, f, 8 h, 8 w], in order."""
    return blend_segments(decoder.decode, latent, tiling)


class Picture(Protocol):
    """Takes the finished parts of tiles, row after row, and becomes one tensor of them."""

    def put(self, part: Tensor, top: int, left: int) -> None: ...
    def finished(self) -> Tensor: ...


class Joined:
    """The parts as they are, joined where they lie."""

    def __init__(self, height: int, width: int) -> None:
        self._rows: list[list[Tensor]] = []

    def put(self, part: Tensor, top: int, left: int) -> None:
        if left == 0:
            self._rows.append([])
        self._rows[-1].append(part)

    def finished(self) -> Tensor:
        return torch.cat([torch.cat(row, COLUMNS) for row in self._rows], ROWS)


def blend_segments(
    decode: Callable[[Tensor], Tensor],
    latent: Tensor,
    tiling: Tiling,
    picture: Callable[[int, int], Picture] = Joined,
) -> Iterator[Tensor]:
    """`decode_segments` with any decoder of one tile: [16, T, h, w] -> [3, 4 (T - 1) + 1, 8 h, 8 w] float32.

    picture: from height and width, what takes each time's finished parts, to another device for example.
    """
    space = _Axis(tiling.tile, tiling.stride, tiling.spatial_ratio, 1)
    time = _Axis(tiling.tile_frames, tiling.stride_frames, tiling.time_ratio, 1)
    return _tiled_time(lambda part: _tiled_space(decode, part, space, picture), latent, time)


def encode_tiled(encoder: VaeEncoder, video: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """video [3, 4 (T - 1) + 1, 8 h, 8 w] in -1..1 -> mean and log variance, each [16, T, h, w] float32."""
    space = _Axis(tiling.tile, tiling.stride, 1, tiling.spatial_ratio)
    time = _Axis(tiling.tile_frames, tiling.stride_frames, 1, tiling.time_ratio)
    parts = _tiled_time(lambda part: _tiled_space(encoder.moments, part, space), video, time)
    return split_moments(torch.cat(list(parts), TIME))


class _Axis:
    """Tile and stride of the input; how much of an output tile is kept, and mixed with the tile before."""

    def __init__(self, tile: int, stride: int, out_ratio: int, in_ratio: int) -> None:
        self.tile, self.stride = tile * in_ratio, stride * in_ratio
        self.keep, self.blend = stride * out_ratio, (tile - stride) * out_ratio

    def made(self, size: int) -> int:
        """How long the result of `size` values of the input is."""
        return size * self.keep // self.stride


def _tiled_time(run: Callable[[Tensor], Tensor], x: Tensor, axis: _Axis) -> Iterator[Tensor]:
    """Runs `run` on [C, T, H, W] in tiles of time and yields the finished parts."""
    frames = x.shape[TIME]
    if frames <= axis.tile:
        yield run(x)
        return
    border: Tensor | None = None
    for start in range(0, frames - 1, axis.stride):  # a last tile of one frame would give nothing
        part = run(x[:, start : start + axis.tile + 1])
        part = part if border is None else _mix(border, part[:, 1:], TIME)
        keep = axis.keep + (border is None)
        border = _border(part, TIME, axis.blend)
        yield part[:, :keep]
        del part  # not held while the next tile is computed


def _tiled_space(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    axis: _Axis,
    picture: Callable[[int, int], Picture] = Joined,
) -> Tensor:
    """Runs `run` on [C, T, H, W] in tiles of rows and columns and joins them."""
    height, width = x.shape[ROWS:]
    joined = picture(axis.made(height), axis.made(width))
    if max(height, width) <= axis.tile:
        joined.put(run(x), 0, 0)
        return joined.finished()
    above: list[Tensor] = []
    for top in range(0, height, axis.stride):
        below: list[Tensor] = []
        border: Tensor | None = None
        for left in range(0, width, axis.stride):
            part = run(x[:, :, top : top + axis.tile, left : left + axis.tile])
            part = _mix(above.pop(0), part, ROWS) if top else part
            part = part if border is None else _mix(border, part, COLUMNS)
            border = _border(part, COLUMNS, axis.blend)
            below.append(_border(part, ROWS, axis.blend))
            joined.put(part[:, :, : axis.keep, : axis.keep], axis.made(top), axis.made(left))
            del part
        above = below
    return joined.finished()


def _border(part: Tensor, dim: int, extent: int) -> Tensor:
    """The last `extent` lines, copied so that the tile can be freed."""
    size = part.shape[dim]
    extent = min(extent, size)
    return part.narrow(dim, size - extent, extent).clone()


def _mix(border: Tensor, part: Tensor, dim: int) -> Tensor:
    """Fades from the neighbour's border into `part`, in place where no gradient is wanted: line y of n has weight y / n
    of the new tile."""
    lines = min(border.shape[dim], part.shape[dim])
    shape = [1, 1, 1, 1]
    shape[dim] = lines
    weight = (torch.arange(lines, dtype=part.dtype, device=part.device) / max(lines, 1)).reshape(shape)
    old = border.narrow(dim, border.shape[dim] - lines, lines)
    new = part.narrow(dim, 0, lines)
    if not (part.requires_grad or border.requires_grad):
        new.mul_(weight).add_(old * (1 - weight))
        return part
    rest = part.narrow(dim, lines, part.shape[dim] - lines)
    return torch.cat([old * (1 - weight) + new * weight, rest], dim)


def _whole_latents(name: str, size: int, ratio: int, overlap: float) -> tuple[int, int]:
    """A tile of `size` pixels or frames -> tile and stride in latents, rounded as the reference rounds."""
    tile = size // ratio
    stride = int(tile * (1 - overlap))
    if stride < 1 or tile * ratio != size or (tile - stride) * ratio != int(size * overlap):
        raise CheckpointError(
            f"VAE config: {name} {size} with tile_overlap_factor {overlap} is not a whole number of latents "
            f"({ratio} to a latent).",
            "Use the config.json that was released with the VAE weights.",
        )
    return tile, stride
