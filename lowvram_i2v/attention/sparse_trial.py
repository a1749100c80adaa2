"""Sparse attention tried on this device: a thousand tokens, against the same lists of blocks in float32; its dense
steps; and the lists of a long video, against a sort.

How far sparse attention is from dense is the video's matter and no fault; that it computes what it says is checked
here, for the self-test before a run and for `check-kernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowvram_i2v.attention import Layout, in_place
from lowvram_i2v.attention.triton_sparse import attend, dense
from lowvram_i2v.kernels import attention_cases, attention_route
from lowvram_i2v.kernels.attention_cut import Cut, cut_sequence
from lowvram_i2v.kernels.attention_reference import relative_l2
from lowvram_i2v.kernels.attention_tiles import INT8, Tile

if TYPE_CHECKING:
    from lowvram_i2v.kernels.attention_lists import Lists

DENSITY = 0.4
LAYOUT = Layout(first_tokens=70, image_tokens=1000, text_tokens=53, step=0, steps=1)
LIMIT = 0.08
"""Largest relative L2 error: what 8 bits may cost, see `attention_cases`."""
LONG, LONG_DENSITY = Layout(first_tokens=3600, image_tokens=118_800, text_tokens=400, step=0, steps=1), 0.2
"""1280x720, 129 frames: so many blocks are chosen from by more warps, and by other code, than few are."""
GRID = 256
"""Steps of 1 / GRID between random scores, which so have few enough bits to be exact in every product."""


def error(device: torch.device, head_dim: int, dtype: torch.dtype) -> float:
    """Relative L2 distance of `triton-sparse` from its definition. Waits for the device."""
    tokens = LAYOUT.image_tokens + LAYOUT.text_tokens
    case = attention_cases.CASES["peaked"]
    given = attention_cases.inputs(case, tokens, attention_cases.HEADS, head_dim, device, dtype)
    q, k, v = (x.float() for x in given)
    exact = attention_route.attend(q, k, v, _cut(device, LAYOUT, DENSITY))
    return relative_l2(attend(*given, out=given[0], layout=LAYOUT, density=DENSITY), exact)


def fault(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None."""
    if wrong := attention_cases.fault(in_place(dense), "eight_bit", head_dim, device, dtype):
        return f"in dense steps {wrong}"
    off = error(device, head_dim, dtype)
    if not off <= LIMIT:
        return f"its self-test (sparse) is off by {off:.1%}, {LIMIT:.1%} is right"
    return lists_fault(LONG, LONG_DENSITY, device, head_dim)


def lists_fault(layout: Layout, density: float, device: torch.device, head_dim: int) -> str | None:
    """What is wrong with the lists of blocks of a sequence, or None; on a CPU torch makes them. Waits for the
    device."""
    if device.type != "cuda":
        return None
    cut, tile = _cut(device, layout, density), _tile(device)
    if lists_are_right(cut, tile, head_dim, device):
        return None
    return f"its lists of {cut.kept} of {cut.key_blocks} blocks are not those with the highest scores"


def lists_are_right(cut: Cut, tile: Tile, head_dim: int, device: torch.device) -> bool:
    """Whether `attention_lists.choose` finds what a sort does, for random means of blocks."""
    from lowvram_i2v.kernels.attention_lists import choose

    generator = torch.Generator(device).manual_seed(2)
    heads, rows = attention_cases.HEADS, torch.arange(cut.query_blocks, device=device)
    k_means = torch.randn(heads, cut.key_blocks, head_dim, generator=generator, device=device)
    k_means = k_means.mul_(GRID).round_().clamp_(-2047, 2047).div_(GRID)
    q_means = torch.zeros(heads, cut.query_blocks, head_dim, device=device)
    q_means[:, rows, rows % head_dim] = 1.0  # each row sees one channel: a score is one number, exactly
    scores = k_means[:, :, rows % head_dim].transpose(1, 2)
    return _are_highest(choose(q_means, k_means, cut, tile), scores, cut)


def _are_highest(made: Lists, scores: Tensor, cut: Cut) -> bool:
    """Ascending lists of the blocks that all see and of the others with the highest scores [heads, query blocks, key
    blocks], equal ones in any choice; a bit for each block that is on no list."""
    scores = scores.masked_fill(attention_route.on_every_list(cut, scores.device), float("inf"))
    blocks = made.blocks.long().clamp(0, cut.key_blocks - 1)  # a wrong place must not stop the device
    bits = (made.skipped[..., None] >> torch.arange(32, device=scores.device) & 1).flatten(-2).bool()
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, blocks, value=True)
    expected = torch.zeros_like(bits)
    expected[..., : len(cut.means)] = ~seen[..., cut.means.start : cut.means.stop]
    highest = scores.topk(cut.kept, dim=-1).values
    return (
        bool((blocks.diff(dim=-1) > 0).all())
        and torch.equal(scores.gather(2, blocks).sort(-1, descending=True).values, highest)
        and torch.equal(bits, expected)
    )


def _tile(device: torch.device) -> Tile:
    """Of the backend on a CUDA device."""
    from lowvram_i2v.kernels.attention_launch import card

    return INT8[card(device)][0]


def _cut(device: torch.device, layout: Layout, density: float) -> Cut:
    """As the backend cuts a sequence on that device."""
    given = layout.image_tokens + layout.text_tokens, layout.first_tokens, layout.image_tokens, density
    if device.type != "cuda":
        return cut_sequence(*given)
    tile = _tile(device)
    return cut_sequence(*given, tile.rows, tile.keys)
