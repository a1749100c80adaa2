"""The space-filling order: a permutation, the first frame first, neighbours near; the model's result is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_i2v.attention.memory import order_bytes
from lowvram_i2v.dit.token_order import BRICK, brick_order, token_order

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))
PATCHES = st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 2, 1)])


@given(GRIDS, PATCHES)
def test_it_is_a_permutation_that_keeps_the_first_frame_first(
    grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    order, (t, h, w) = token_order(grid, patch), grid
    assert torch.equal(order.tokens.sort().values, torch.arange(t * h * w))
    assert torch.equal(order.tokens[: h * w].sort().values, torch.arange(h * w))
    size = [tokens * side for tokens, side in zip(grid, patch, strict=True)]
    latents = torch.randn(3, *size)
    arranged = order.arranged(latents)
    assert torch.equal(order.restored(arranged), latents)
    patches, moved = (
        x.unfold(1, patch[0], patch[0])
        .unfold(2, patch[1], patch[1])
        .unfold(3, patch[2], patch[2])
        .reshape(3, t * h * w, -1)
        for x in (latents, arranged)
    )
    assert torch.equal(moved, patches[:, order.tokens])
    table = torch.arange(t * h * w).float()[:, None]
    assert torch.equal(order.rope((table, -table))[0][:, 0].long(), order.tokens)


def spread(order: torch.Tensor, size: tuple[int, int, int], block: int, offset: int) -> torch.Tensor:
    """Variance of the places of each block of consecutive tokens, the first of which starts at `offset`."""
    places = torch.stack(torch.unravel_index(order, size), -1)[offset:].float()
    return places[: len(places) // block * block].reshape(-1, block, 3).var(1, unbiased=False).sum(1)


@pytest.mark.parametrize("size", [(32, 45, 80), (32, 32, 32), (8, 30, 44), (32, 34, 60), (6, 9, 14)])
def test_neighbours_are_nearer_than_row_by_row(size: tuple[int, int, int]) -> None:
    order = brick_order(size, BRICK)
    raster = spread(torch.arange(size[0] * size[1] * size[2]), size, 64, 0).mean()
    for offset in (0, 16, 40):  # blocks need not begin where bricks do
        found = spread(order, size, 64, offset)
        assert found.mean() < 7
        assert found.max() < 10
        assert found.mean() < raster / 2
    places = torch.stack(torch.unravel_index(order, size), -1)
    steps = (places[1:] - places[:-1]).abs().sum(1)
    assert steps.float().mean() < 1.1
    assert steps.max() <= 8


def test_whole_bricks_are_bricks() -> None:
    places = torch.stack(torch.unravel_index(brick_order((8, 12, 4), BRICK), (8, 12, 4)), -1).reshape(-1, 64, 3)
    assert ((places.amax(1) - places.amin(1)) == 3).all()


def test_bytes_are_those_of_the_indices_and_one_copy_of_the_latents() -> None:
    order = token_order((5, 6, 7), (1, 2, 2))
    tensors = (order.tokens, order.pixels, order.back, torch.empty(33, 5, 12, 14))
    assert order_bytes(5 * 6 * 7, 4, 33) == sum(x.nbytes for x in tensors)
