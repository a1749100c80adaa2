"""Block-sparse attention against its definition, in the interpreter (see `test_attention_interpreted.py`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowvram_i2v.kernels import attention_reference as reference
from lowvram_i2v.kernels.attention_int8 import attend_quantized
from lowvram_i2v.kernels.attention_quantize import encode, quantize, statistics
from lowvram_i2v.kernels.attention_sparse import attend, attend_routed, block_means, brick_order, route
from lowvram_i2v.kernels.attention_tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = Tile(32, 32, 4, 2, "fp16")
TOKENS, HEADS, DIM = 32 * 6 + 5, 2, 64


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of 32 tokens with directions of their own, as bricks of a video have."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(3, 7, 1, HEADS, DIM, generator=generator).expand(3, 7, 32, HEADS, DIM)
    x = own.reshape(3, 224, HEADS, DIM)[:, :TOKENS] + 0.5 * torch.randn(3, TOKENS, HEADS, DIM, generator=generator)
    return x.half().to(DEVICE).unbind()


def test_lists_and_means_give_the_definition() -> None:
    q, k, v = inputs()
    centres = statistics(k, v)
    means = block_means(k, 32)
    always = torch.arange(7, device=DEVICE) == 6
    chosen = route(q, means - centres[0], always, TILE, 3 / 7)
    assert chosen.blocks.shape == (HEADS, 7, 3)
    assert (chosen.blocks == 6).any(-1).all()
    assert torch.equal(chosen.skipped.sum(-1), torch.full((HEADS, 7), 4, device=DEVICE))
    kv, mean_kv = quantize(k, v, TILE, centres), encode(means, block_means(v, 32), TILE, centres)
    result = attend_routed(q, kv, mean_kv, chosen, TILE)
    assert reference.relative_l2(result, reference.sparse_attention(q, k, v, chosen.blocks, 32, 32)) < 0.02
    assert torch.equal(attend(q, k, v, TILE, 3 / 7, always, out=q), result)


def test_all_blocks_is_dense() -> None:
    q, k, v = inputs()
    always = torch.ones(7, dtype=torch.bool, device=DEVICE)
    expected = attend_quantized(q, quantize(k, v, TILE), TILE)
    assert reference.relative_l2(attend(q, k, v, TILE, 1.0, always), expected) < 1e-3


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 4, 4), (33, 9, 14), (5, 8, 3)])
def test_brick_order_visits_every_token_once_and_stays_near(size: tuple[int, int, int]) -> None:
    order = brick_order(*size)
    tokens = size[0] * size[1] * size[2]
    assert torch.equal(order.sort().values, torch.arange(tokens))
    if all(n % 4 == 0 for n in size):
        places = torch.stack(torch.unravel_index(order, size), -1).reshape(-1, 64, 3)
        assert ((places.amax(1) - places.amin(1)) == 3).all()
